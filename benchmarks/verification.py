"""How far apart the right and a wrong adapter are when the engine is held against a probe: what the tolerance rests on.

    python -m benchmarks.verification --model FOLDER [--engine embedded|vllm] [--dtype bfloat16] [--steps 2,4,8,16]

Adapters are trained in turn on the same demonstrations of the order desk, each a few gradient steps longer than the one
before it: siblings, as versions of a team's agent are. The learner writes their probes in 32 bits. Each is then held
against each of the probes, and so is the base network. Printed is how far it is off in nats, as the root of the mean
square and at the furthest token, and whether it passes.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.figures import counts
from benchmarks.rollouts import Rollouts
from learner.data.training_data import TrainingData
from learner.objectives.build import objective_of
from learner.options import ObjectiveOptions, TrainingOptions
from learner.training.trainer import Trainer
from policies.adapters.probe import read_probe, tolerance_in
from policies.types import Adapter, Engine
from runtime.adapters.verification import deviation_of, served_tokens
from runtime.engines.embedded.precision import Precision
from tools.worlds import load_world

NUM_DEMONSTRATIONS = 8
MAX_CONTEXT = 4096


def trained(model: Path, steps: Sequence[int], folder: Path) -> Iterator[Adapter]:
    """One adapter for each number of gradient steps, with its probe."""
    rollouts = Rollouts(load_world("order_desk"), model)
    tasks = [rollouts.world.task("train", index) for index in range(NUM_DEMONSTRATIONS)]
    demonstrations = rollouts.demonstrations(tasks)
    prompts = [state.prompt for each in demonstrations for state in each.states]
    objective = objective_of("sft", TrainingData(tuple(demonstrations)), ObjectiveOptions())
    for version, number in enumerate(steps, start=1):
        options = TrainingOptions(epochs=0, min_gradient_steps=number, trajectories_per_step=2)
        trainer = Trainer(model, None, options, "cpu")
        trainer.train(objective)
        path = folder / str(number)
        trainer.save(path, prompts, "# Of a benchmark\n")
        yield Adapter(f"after {number} steps", version, path, options.rank, None, "")


async def start(engine: str, model: Path, dtype: Precision, num_adapters: int) -> Engine:
    """The engine in that precision, with a place for each adapter."""
    if engine == "embedded":
        from runtime.engines.embedded.engine import EmbeddedEngine

        return EmbeddedEngine(model, device="cpu", num_threads=1, precision=dtype, max_adapters=num_adapters)
    from runtime.engines.vllm.engine import VllmEngine

    return await VllmEngine.start(
        model, max_batch_size=4, max_adapters=num_adapters, num_threads=1, max_context_tokens=MAX_CONTEXT,
        engine_args={"dtype": dtype},
    )  # fmt: skip


async def compare(engine: Engine, adapters: Sequence[Adapter], tolerance: float) -> None:
    """Print a line for each probe and each that is held against it."""
    for adapter in adapters:
        await engine.load_adapter(adapter)
    print(f"tolerance {tolerance:.3g} nats\n\n| probe of | served | rms | furthest | |\n|---|---|---|---|---|")
    for own in adapters:
        for served in (*adapters, None):
            off = deviation_of(await served_tokens(engine, served, read_probe(own.path)))
            verdict = "passes" if off.is_within(tolerance) else "refused"
            name = served.name if served else "base"
            print(f"| {own.name} | {name} | {off.rms:.4f} | {off.largest:.3f} | {verdict} |", flush=True)


async def run(options: argparse.Namespace, folder: Path) -> None:
    adapters = list(trained(options.model, options.steps, folder))
    engine = await start(options.engine, options.model, options.dtype, len(adapters))
    try:
        await compare(engine, adapters, tolerance_in(options.dtype))
    finally:
        await engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a network's folder")
    parser.add_argument("--engine", choices=("embedded", "vllm"), default="embedded")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--steps", type=counts, default="2,4,8,16", help="gradient steps, with commas (default 2,4,8,16)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(options, Path(folder)))


if __name__ == "__main__":
    main()
