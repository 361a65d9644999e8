"""Trains with little memory and saves with little disk, really, and prints what became of it. Run by test_trainer.py.

A process of its own, because the limits are the process's. They are soft ones: each is lifted again.
"""

from __future__ import annotations

import json
import random
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from learner.objectives.objectives import Likelihood, action_sequence
from learner.options import TrainingOptions
from learner.packing.prefix_tree import ScoredSequence
from learner.training.trainer import Trainer, TrainingFailed
from tests.serving import NOVICE_FOLDER

MIB = 2**20


@contextmanager
def limited(kind: int, limit: int) -> Iterator[None]:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (hard, hard))


def memory_in_use() -> int:
    """Bytes of address space."""
    found = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def random_rows(num_sequences: int, num_tokens: int) -> tuple[ScoredSequence, ...]:
    draw = random.Random(0)
    tokens = [tuple(draw.choices(range(400), k=num_tokens)) for _ in range(num_sequences)]
    return tuple(action_sequence(row[:-20], row[-20:], (number,)) for number, row in enumerate(tokens))


def train(rows: tuple[ScoredSequence, ...], spare_mib: int | None) -> dict[str, Any]:
    """One gradient step with so much more memory than is in use before it; None: as much as there is."""
    options = TrainingOptions(
        lr=2e-3, epochs=1, min_gradient_steps=0, trajectories_per_step=50, rank=4, token_budget=100_000
    )
    trainer = Trainer(NOVICE_FOLDER, None, options)
    before = torch.cat(trainer.logprobs(rows[:1])).mean().item()
    limit = resource.RLIM_INFINITY if spare_mib is None else memory_in_use() + spare_mib * MIB
    with limited(resource.RLIMIT_AS, limit):
        try:
            report = trainer.train(Likelihood("sft", rows))
        except TrainingFailed as error:
            return {"failed": str(error)}
    after = torch.cat(trainer.logprobs(rows[:1])).mean().item()
    return {"token_budget": report.token_budget, "gain": after - before}


def save(folder: Path) -> dict[str, Any]:
    """No file may grow beyond 50 kB: the weights are larger, what PEFT writes before them is not."""
    trainer = Trainer(NOVICE_FOLDER, None, TrainingOptions())
    with limited(resource.RLIMIT_FSIZE, 50_000):
        try:
            trainer.save(folder / "adapter", [(1, 2, 3)], "card")
        except TrainingFailed as error:
            return {"failed": str(error), "left": [path.name for path in folder.iterdir()]}
    return {"left": [path.name for path in folder.iterdir()]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {
        "tight": train(random_rows(8, 700), spare_mib=100),  # first: what others freed would be room too
        "one long row": train(random_rows(1, 5600), spare_mib=20),
        "roomy": train(random_rows(8, 700), spare_mib=None),
        "full disk": save(Path(sys.argv[1])),
    }
    print(json.dumps(found))
