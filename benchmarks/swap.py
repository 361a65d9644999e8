"""Two hundred swaps under load: what fails, what is answered under the wrong adapter, and what running streams feel.

    python -m benchmarks.swap [--engine embedded|vllm] [--model FOLDER] [--swaps 200] [--json FILE]

A real server (python serve.py) in a process of its own answers eight streams at a time over HTTP. Each swap is a new
version: a PEFT folder with a true probe is registered (validated, loaded, verified), promoted, and what acted before
drains. Phases with swaps take turns with phases of the same length without: there only the load runs. In both, a short
request is sent at every beat, so that the load is the same; in a phase with swaps it follows each promotion, and its
first token is the new adapter's.

Afterwards every answer is computed again: a plain forward of transformers + PEFT over the logged token ids, under the
adapter that the answer's x-adapter header named, must give the logged behavior logprobs within 1e-3. That this could
fail is shown by doing the same under the version before: how many answers that would have explained as well.

Without --model the network is random, of the novice's size and with its tokenizer: the novice's own answers are too
short to swap under. Versions are noise on the weights of one adapter. Server, client and engine share the machine's
cores, so gaps are upper bounds, and only their ratio says something of the swap.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.figures import percentile
from benchmarks.plain_http import PlainClient
from learner.training.probing import make_probe
from policies.adapters.base_network import read_base_network
from policies.adapters.probe import write_probe
from runtime.store.episodes import Step
from runtime.store.step_log import StepLog

ROOT = Path(__file__).parent.parent
NOVICE_FOLDER = ROOT / "policies" / "novice_model"
NAME = "network"
"""Under which it is served."""
NUM_STREAMS = 8
STREAM_TOKENS, BEAT_TOKENS = 128, 8
NUM_PHASES = 10
"""With swaps; as many without."""
BEAT_S = 0.5
"""A swap begins this long after the one before began, or as soon as that is done."""
SLOT_WAIT_S = 0.05
TOLERANCE = 1e-3
RECHECK_ROWS = 16
GAP_GOAL = 1.2
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROBE_PROMPTS = ((3, 1, 4, 1, 5, 9, 2, 6), (27, 18, 28, 18))


# -------------------------------------------------------------------------------------- network and versions


def make_network(folder: Path) -> Path:
    """A random network of the novice's shape, with the novice's tokenizer."""
    torch.manual_seed(0)
    shutil.copytree(NOVICE_FOLDER, folder)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(NOVICE_FOLDER)).save_pretrained(folder)
    return folder


def loaded(network: Path) -> Any:
    """In 32 bits, as both engines are made to serve it: in 16, noise and rounding cannot be told apart."""
    return AutoModelForCausalLM.from_pretrained(network, dtype=torch.float32).eval()


def make_versions(network: Path, folder: Path, num_versions: int) -> list[Path]:
    """PEFT folders with true probes, each with its own noise."""
    fingerprint = read_base_network(network).fingerprint
    base = loaded(network)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=TARGET_MODULES, task_type="CAUSAL_LM")
    peft_model = get_peft_model(base, lora).eval()
    paths = []
    for version in tqdm(range(num_versions), desc="making versions", unit="adapter"):
        path = folder / f"version-{version}"
        generator = torch.Generator().manual_seed(version)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
        peft_model.save_pretrained(str(path))
        write_probe(path, make_probe(peft_model, fingerprint, PROBE_PROMPTS))
        paths.append(path)
    return paths


@contextmanager
def served(
    network: Path,
    state: Path,
    engine: str,
    world: str = "",
    learner_args: Sequence[str] = (),
    engine_args: Sequence[str] = (),
) -> Iterator[int]:
    """A server on a free port, whose model is called `network`."""
    options = ["--model", str(network), "--engine", engine, "--state", str(state), "--world", world, "--threads", "1"]
    options += ["--served-name", NAME, "--learn-every", "0"]
    options += [word for each in learner_args for word in ("--learner-arg", each)]
    options += [word for each in engine_args for word in ("--engine-arg", each)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STEPAGENT_")}
    with (state.parent / "server.log").open("w") as errors:
        server = subprocess.Popen(
            [sys.executable, "serve.py", "--port", "0", *options],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
        )  # fmt: skip
        try:
            yield _port_of(server)
        finally:
            server.terminate()
            server.wait()


def _port_of(server: subprocess.Popen[str]) -> int:
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            return int(found[1])
    raise SystemExit(f"the server ended with exit code {server.wait()} before it listened")


# ---------------------------------------------------------------------------------------------------- the load


@dataclass(slots=True)
class Answered:
    """A streamed answer that came whole."""

    step: str
    adapter: str
    """As the x-adapter header said."""
    came_at: list[float]
    """When each token came, in seconds of time.perf_counter."""


@dataclass(slots=True)
class Load:
    """What clients saw."""

    answers: list[Answered] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


async def ask(client: PlainClient, seed: int, num_tokens: int) -> Answered:
    """One streamed answer to a few random words, of an episode of its own. Raises as `streamed` does."""
    draw = random.Random(seed)
    words = " ".join("".join(draw.choices("abcdefghij", k=4)) for _ in range(8))
    body = {
        "model": NAME, "messages": [{"role": "user", "content": words}], "tools": [], "stream": True,
        "logprobs": True, "max_completion_tokens": num_tokens, "metadata": {"episode_id": f"ep_swap_{seed}"},
    }  # fmt: skip
    return await streamed(client, body)


async def streamed(client: PlainClient, body: dict[str, Any]) -> Answered:
    """One streamed answer with logprobs, which tell each token apart. Raises for whatever is not a whole answer."""
    answer = await client.stream("/v1/chat/completions", body)
    if not answer.pieces[-1][1].endswith(b"data: [DONE]\n\n"):
        raise RuntimeError(f"a stream ended with {answer.pieces[-1][1]!r}")
    came_at = [at for at, piece in answer.pieces for _ in range(piece.count(b'"logprobs":{"content":['))]
    # An end that is sampled first has no logprobs to show: its stream's last piece tells when it came.
    return Answered(answer.headers["x-step-id"], answer.headers["x-adapter"], came_at or [answer.pieces[-1][0]])


async def keep_asking(port: int, load: Load, stream: int, is_over: asyncio.Event) -> None:
    client = PlainClient(port)
    number = 0
    while not is_over.is_set():
        number += 1
        try:
            load.answers.append(await ask(client, 1_000_000 * (stream + 1) + number, STREAM_TOKENS))
        except (RuntimeError, OSError, EOFError) as error:
            load.failures.append(repr(error))
            client = PlainClient(port)
    await client.close()


# --------------------------------------------------------------------------------------------------- the swaps


@dataclass(frozen=True, slots=True)
class SwapTimes:
    """Of one swap, in seconds."""

    register: float
    """Copied in, validated, loaded and verified, as far as it did not wait for a slot."""
    waited: float
    """For a slot of the engine."""
    promote: float
    first_token: float
    """From asking for the promotion to the first token that the new adapter said to a user."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of time, with or without swaps."""

    began: float
    ended: float
    has_swaps: bool


async def run_phases(port: int, versions: Sequence[Path], load: Load) -> tuple[list[Phase], list[SwapTimes], list[str]]:
    """All phases under the load; the phases, each swap's times, and the versions' names in order."""
    is_over = asyncio.Event()
    streams = [asyncio.create_task(keep_asking(port, load, stream, is_over)) for stream in range(NUM_STREAMS)]
    phases, times, names = [], [], []
    await asyncio.sleep(2 * BEAT_S)
    size = -(-len(versions) // NUM_PHASES)
    with tqdm(total=len(versions), desc="swapping", unit="swap") as bar:
        for start in range(0, len(versions), size):
            began = time.perf_counter()
            for path in versions[start : start + size]:
                beat = time.perf_counter()
                name, swap_times = await swap(port, path, load, seed=len(times))
                names.append(name)
                times.append(swap_times)
                bar.update()
                await asyncio.sleep(beat + BEAT_S - time.perf_counter())
            ended = time.perf_counter()
            phases.append(Phase(began, ended, True))
            phases.append(await quiet_phase(port, load, ended - began, seed=100_000_000 + 1000 * start))
    is_over.set()
    await asyncio.gather(*streams)
    return phases, times, names


async def swap(port: int, path: Path, load: Load, seed: int) -> tuple[str, SwapTimes]:
    """One version from its folder to its first answer. Raises where anything but a lack of slots goes wrong."""
    operator, user, waited = PlainClient(port), PlainClient(port), 0.0
    while True:
        began = time.perf_counter()
        try:
            name = json.loads(await operator.post("/v1/adapters", {"path": str(path)}))["name"]
            break
        except RuntimeError as error:
            if "slots of the engine are taken" not in str(error):
                raise
            await asyncio.sleep(SLOT_WAIT_S)
            waited += time.perf_counter() - began
    registered = time.perf_counter()
    await operator.post(f"/v1/adapters/{name}/promote", {"reason": "benchmark"})
    promoted = time.perf_counter()
    answer = await ask(user, seed, BEAT_TOKENS)
    if answer.adapter != name:
        load.failures.append(f"a new episode was answered by {answer.adapter} after {name} was promoted")
    load.answers.append(answer)
    first_token = answer.came_at[0] - registered
    await operator.close()
    await user.close()
    return name, SwapTimes(registered - began, waited, promoted - registered, first_token)


async def quiet_phase(port: int, load: Load, seconds: float, seed: int) -> Phase:
    user, began = PlainClient(port), time.perf_counter()
    while (beat := time.perf_counter()) < began + seconds:
        seed += 1
        load.answers.append(await ask(user, seed, BEAT_TOKENS))
        await asyncio.sleep(beat + BEAT_S - time.perf_counter())
    await user.close()
    return Phase(began, time.perf_counter(), False)


def gaps_ms(load: Load, phase: Phase) -> list[float]:
    """Milliseconds between tokens of one stream that both came within the phase."""
    return [
        (later - earlier) * 1000
        for answer in load.answers
        for earlier, later in zip(answer.came_at, answer.came_at[1:], strict=False)
        if phase.began <= earlier and later <= phase.ended
    ]


# ------------------------------------------------------------------------------------------------ the recheck


@dataclass(slots=True)
class Recheck:
    """Answers held against transformers + PEFT."""

    num_answers: int = 0
    num_tokens: int = 0
    num_wrong: int = 0
    """Whose logprobs are not those of the adapter that the header named, or that the log names another for."""
    worst: float = 0.0
    """The largest deviation, in nats."""
    num_ambiguous: int = 0
    """That the version before would have explained as well."""


def recheck(load: Load, state: Path, network: Path, names: Sequence[str]) -> Recheck:
    """Compute every answer again under the adapter it was answered by, and under the one before."""
    torch.set_num_threads(1)
    log = StepLog(state / "agent.db", read_only=True)
    found, base = Recheck(), loaded(network)
    by_adapter: dict[str, list[Step]] = {}
    for answer in load.answers:
        step = log.step(answer.step)
        if step is None or step.adapter != answer.adapter or len(step.completion_token_ids) < len(answer.came_at):
            found.num_answers += 1
            found.num_wrong += 1
            continue
        by_adapter.setdefault(step.adapter, []).append(step)
    order = ["base", *names]
    for adapter, steps in tqdm(sorted(by_adapter.items()), desc="rechecking", unit="adapter"):
        before = order[order.index(adapter) - 1]
        for deviation, other in zip(
            deviations(base, state, adapter, steps), deviations(base, state, before, steps), strict=True
        ):
            found.worst = max(found.worst, deviation)
            found.num_wrong += deviation > TOLERANCE
            found.num_ambiguous += other <= TOLERANCE
        found.num_answers += len(steps)
        found.num_tokens += sum(len(step.completion_token_ids) for step in steps)
    log.close()
    return found


@torch.no_grad()
def deviations(base: Any, state: Path, adapter: str, steps: Sequence[Step]) -> list[float]:
    """Of each step the largest difference, in nats, between logged logprobs and those under the adapter."""
    folder = str(state / "adapters" / adapter)
    network = base if adapter == "base" else PeftModel.from_pretrained(base, folder).eval()
    found = list[float]()
    for start in range(0, len(steps), RECHECK_ROWS):
        some = steps[start : start + RECHECK_ROWS]
        rows = [torch.tensor([*step.prompt_token_ids, *step.completion_token_ids]) for step in some]
        logits = network(input_ids=pad_sequence(rows, batch_first=True)).logits  # padded to the right: nobody sees it
        for step, ids, after in zip(some, rows, logits, strict=True):
            first = len(step.prompt_token_ids)
            logprobs = after[first - 1 : len(ids) - 1].log_softmax(-1).gather(1, ids[first:, None])[:, 0]
            found.append((logprobs - torch.tensor(step.behavior_logprobs)).abs().max().item())
    if adapter != "base":
        network.unload()
    return found


# ---------------------------------------------------------------------------------------------------- the table


def figures_of(load: Load, phases: Sequence[Phase], times: Sequence[SwapTimes], checked: Recheck) -> dict[str, Any]:
    sides = {
        side: [gaps_ms(load, phase) for phase in phases if phase.has_swaps == (side == "with swaps")]
        for side in ("without", "with swaps")
    }
    ratios = [
        percentile(busy, 99) / percentile(quiet, 99)
        for quiet, busy in zip(sides["without"], sides["with swaps"], strict=True)
    ]
    gaps = {side: _gap_figures(of_phases) for side, of_phases in sides.items()}
    return {
        "swaps": len(times),
        "answers": len(load.answers),
        "failed": len(load.failures),
        "failures": load.failures[:5],
        "recheck": asdict(checked),
        "gaps_ms": gaps,
        "p99_ratio": gaps["with swaps"]["p99"] / gaps["without"]["p99"],
        "p99_ratio_by_phase": ratios,
        "seconds": {name: _spread([getattr(one, name) for one in times]) for name in SwapTimes.__slots__},
    }


def _gap_figures(of_phases: Sequence[list[float]]) -> dict[str, float]:
    gaps = [gap for phase in of_phases for gap in phase]
    return {"tokens": len(gaps), "median": statistics.median(gaps), "p99": percentile(gaps, 99), "longest": max(gaps)}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "p99": percentile(values, 99), "longest": max(values)}


def print_figures(figures: dict[str, Any], engine: str) -> None:
    checked = figures["recheck"]
    print(f"{engine} engine, {figures['swaps']} swaps under {NUM_STREAMS} streams, {figures['answers']} answers")
    print("| ms between tokens of a stream | tokens | median | p99 | longest |\n|---|---|---|---|---|")
    for side, gaps in figures["gaps_ms"].items():
        print(f"| {side} | {gaps['tokens']} | {gaps['median']:.1f} | {gaps['p99']:.1f} | {gaps['longest']:.1f} |")
    ratios = figures["p99_ratio_by_phase"]
    print(
        f"p99 gap with swaps: {figures['p99_ratio']:.2f}x of that without "
        f"({min(ratios):.2f} to {max(ratios):.2f} by phase)"
    )
    print("| seconds of a swap | median | p99 | longest |\n|---|---|---|---|")
    words = {
        "register": "register: validate, load, verify", "waited": "waited for a slot before",
        "promote": "promote", "first_token": "promote to first token of the new adapter",
    }  # fmt: skip
    for name, spread in figures["seconds"].items():
        print(f"| {words[name]} | {spread['median']:.3f} | {spread['p99']:.3f} | {spread['longest']:.3f} |")
    print(f"failed requests: {figures['failed']} (goal: 0: {_verdict(not figures['failed'])})", *figures["failures"])
    print(
        f"answers under the wrong adapter: {checked['num_wrong']} of {checked['num_answers']} (goal: 0: "
        f"{_verdict(not checked['num_wrong'])}); all were computed again, {checked['num_tokens']} tokens, off by "
        f"{checked['worst']:.1e} nats at most; the version before would have explained {checked['num_ambiguous']}"
    )
    print(f"p99 gap at most {GAP_GOAL}x: {_verdict(figures['p99_ratio'] <= GAP_GOAL)}")


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "not met"


def measure(engine: str, model: Path | None, num_swaps: int, folder: Path) -> dict[str, Any]:
    network, state, load = model or make_network(folder / "network"), folder / "state", Load()
    versions = make_versions(network, folder / "versions", num_swaps)
    state.mkdir()
    with served(network, state, engine, engine_args=("dtype=float32",) if engine == "vllm" else ()) as port:
        phases, times, names = asyncio.run(run_phases(port, versions, load))
    return figures_of(load, phases, times, recheck(load, state, network, names))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=("embedded", "vllm"), default="embedded")
    parser.add_argument("--model", type=Path, help="a network's folder; default: a small random one")
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        figures = measure(options.engine, options.model, options.swaps, Path(folder))
    print_figures(figures, options.engine)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    raise SystemExit(1 if figures["failed"] or figures["recheck"]["num_wrong"] else 0)


if __name__ == "__main__":
    main()
