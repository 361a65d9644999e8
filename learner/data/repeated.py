"""Finds demonstrations that another one repeats step by step.

What traces export is one record for each call of a model, with all that was said before: a run of n steps comes as n
demonstrations, and learned from all of them its first step would count n times.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

from runtime.store.episodes import Step

T = TypeVar("T")


def repeated(paths: dict[T, Sequence[Step]]) -> set[T]:
    """The names of the paths whose steps, one by one and token by token, are the first steps of a longer path."""
    begun, whole = set[int](), dict[T, int]()
    for name, path in paths.items():
        so_far = list(accumulate(path, _and_then, initial=0))
        begun.update(so_far[1:-1])
        whole[name] = so_far[-1]
    return {name for name, steps in whole.items() if steps in begun}


def _and_then(before: int, step: Step) -> int:
    return hash((before, step.prompt_token_ids, step.completion_token_ids))
