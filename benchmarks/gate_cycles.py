"""The gate with real networks: ten transcripts, no world, one whole cycle; what it decided, and how much better the
candidate really was.

    python -m benchmarks.gate_cycles [--seeds 1-20] [--demonstrations 10] [--num-cycles 2] [--cycles FILE]
        [--report]

The base is the novice with noise on its weights, so that there is something to learn. A run is a server, an import of
transcripts of the order desk that no other seed has, and cycles, at the learning rate of an arm: the default, a
tenth of it, a thirtieth, and one so small that the candidate is hardly another. What a cycle promotes acts in the next
one, where there is ever less to learn: its candidates are really others, and hardly better. The true gain is the
candidate's step agreement less that of what acted, at the expert's states of 100 held-out tasks, four draws each at
temperature 1.

A server's cycles are lines of a file once it is done, and not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import copytree
from statistics import fmean

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from benchmarks.cycle_stages import see_through
from benchmarks.demo import WORLD, server, write_demonstrations
from benchmarks.figures import spread
from benchmarks.lockstep import load_policy
from benchmarks.rollouts import Rollouts
from learner.practice import success_interval
from policies.novice.build import NOVICE_PATH

NOISE = 0.5
"""Standard deviation of the noise, in those of each matrix."""
RATES: dict[str, float | None] = {"default": None, "a tenth": 4e-4, "a thirtieth": 1.3e-4, "next to none": 1e-6}
"""Learning rates by arm; None is the learner's own, 4.3e-3 at the novice's width."""
NUM_TASKS = 100
NUM_DRAWS = 4


@dataclass(frozen=True, slots=True)
class CycleRun:
    """One cycle, and its candidate as it really was."""

    arm: str
    seed: int
    demonstrations: int
    is_promoted: bool
    num_tried: int
    """Demonstrations that the gate tried before it decided."""
    gain_seen: float
    """By the gate, in agreement from 0 to 1."""
    gain: float
    """The true one."""
    cycle: int = 1
    """Of its server, from 1."""


def noisy_novice(folder: Path) -> Path:
    """The novice with noise on its matrices; its folder."""
    copytree(NOVICE_PATH, folder)
    weights, draw = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(1)
    for name in sorted(weights):
        if weights[name].ndim == 2:
            noise = torch.randn(weights[name].shape, generator=draw)
            weights[name] = weights[name] + (NOISE * weights[name].float().std() * noise).to(weights[name])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def agreement(base: Path, adapter: Path | None) -> float:
    """Share of the draws at the expert's states of held-out tasks that mean what the expert's action does."""
    rollouts = Rollouts(WORLD, base)
    tasks = [WORLD.task("heldout", index) for index in range(NUM_TASKS)]
    draw = torch.Generator().manual_seed(0)
    seen = rollouts.inspected(load_policy(base, adapter), tasks, NUM_DRAWS, draw)
    return fmean(bool(action.agrees) for each in seen for state in each.states for action in state.policy_actions)


def runs_of(base: Path, before: float, arm: str, seed: int, number: int, num_cycles: int) -> Iterator[CycleRun]:
    """A server's first cycles: fewer, where there is nothing left to learn."""
    rate = RATES[arm]
    options = ["--learner-arg", f"seed={seed}", "--learner-arg", "discriminator=false"]
    options += ["--learner-arg", "implicit-rewards=false", "--learner-arg", "gate-tasks=0"]
    options += ["--learner-arg", f"lr={rate}"] if rate else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_demonstrations(folder / "transcripts.jsonl", number, first=seed * number)
        with server(folder / "state", ["--model", str(base), *options], folder / "server.log") as url:
            command = [sys.executable, "-m", "learner", "import", str(folder / "transcripts.jsonl")]
            subprocess.run([*command, "--url", f"{url}/v1"], check=True, capture_output=True)
            for cycle in range(1, num_cycles + 1):
                seen = see_through(url, folder / "state")
                if seen["stage"] == "no_lesson" and cycle > 1:
                    print(f"{arm}, seed {seed}, cycle {cycle}: {seen['stage']}: {seen['message']}", flush=True)
                    return
                if not seen["decisions"]:
                    raise SystemExit(f"{arm}, seed {seed}, cycle {cycle}: {seen['stage']}: {seen['message']}")
                decision = seen["decisions"][0]
                evidence = decision["evidence"]
                after = agreement(base, folder / "state" / "adapters" / decision["candidate"])
                yield CycleRun(
                    arm, seed, number, decision["promote"], evidence["num_trials"], round(evidence["gain"], 4),
                    round(after - before, 4), cycle,
                )  # fmt: skip
                before = after if decision["promote"] else before


def table(runs: Sequence[CycleRun]) -> str:
    """By learning rate: what was promoted, with its 95 % interval, and the gains in points."""
    lines = [
        "| learning rate | cycle | runs | true gain | gain seen | promoted | demonstrations tried |",
        "|" + "---|" * 7,
    ]
    for arm, cycle in sorted(
        {(each.arm, each.cycle) for each in runs}, key=lambda each: (list(RATES).index(each[0]), each)
    ):
        found = [each for each in runs if (each.arm, each.cycle) == (arm, cycle)]
        lines.append(
            f"| {arm} | {cycle} | {len(found)} | {spread([100 * each.gain for each in found], 0)} "
            f"| {spread([100 * each.gain_seen for each in found], 0)} | {_share(found)} "
            f"| {spread([each.num_tried for each in found], 0)} |"
        )
    for low, high in ((-1.0, 0.01), (0.01, 0.1), (0.1, 0.2), (0.2, 0.3), (0.3, 1.0)):
        found = [each for each in runs if low <= each.gain < high]
        if found:
            lines.append(
                f"| true gain {100 * low:+.0f} to {100 * high:+.0f} | | {len(found)} | | | {_share(found)} | |"
            )
    return "\n".join(lines)


def _share(runs: Sequence[CycleRun]) -> str:
    num_promoted = sum(each.is_promoted for each in runs)
    low, high = success_interval(num_promoted, len(runs))
    return f"{num_promoted} of {len(runs)} ({100 * low:.0f}-{100 * high:.0f} %)"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--seeds", default="1-20", help="from-to (default 1-20)")
    parser.add_argument("--arms", default=";".join(RATES), help="with semicolons (default: all)")
    parser.add_argument(
        "--num-cycles", type=int, default=1, help="of each server, one after the other; a file is of one number"
    )
    parser.add_argument("--demonstrations", type=int, default=10)
    parser.add_argument("--cycles", type=Path, default=Path("state/gate_cycles.jsonl"), help="the finished runs")
    parser.add_argument("--report", action="store_true", help="only print what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    options.cycles.parent.mkdir(parents=True, exist_ok=True)
    lines = options.cycles.read_text("utf-8").splitlines() if options.cycles.exists() else []
    runs = [CycleRun(**json.loads(line)) for line in lines]
    first, last = map(int, options.seeds.split("-"))
    with tempfile.TemporaryDirectory() as folder:
        base = noisy_novice(Path(folder) / "noisy")
        before = agreement(base, None)
        print(f"step agreement of the base: {100 * before:.1f} %", flush=True)
        wanted = [(arm, seed) for seed in range(first, last + 1) for arm in options.arms.split(";")]
        there = {(each.arm, each.seed) for each in runs if each.demonstrations == options.demonstrations}
        for arm, seed in () if options.report else wanted:
            if (arm, seed) not in there:
                found = list(runs_of(base, before, arm, seed, options.demonstrations, options.num_cycles))
                print(*found, sep="\n", flush=True)
                runs += found
                with options.cycles.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(asdict(each)) + "\n" for each in found)
    print(table([each for each in runs if each.demonstrations == options.demonstrations]))


if __name__ == "__main__":
    main()
