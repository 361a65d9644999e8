"""Finds demonstrations that another one repeats step by step.

What traces export is one record for each call of a model, with all that was said before: a run of n steps comes as n
demonstrations, and learned from all of them its first step would count n times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from runtime.store.episodes import Step

T = TypeVar("T")


def repeated(paths: dict[T, Sequence[Step]]) -> set[T]:
    """The names of the paths whose steps, all of them and token by token, are also steps of one longer path."""
    told_by: dict[int, set[T]] = {}
    for name, path in paths.items():
        for step in path:
            told_by.setdefault(_told(step), set()).add(name)
    found = set[T]()
    for name, path in paths.items():
        tell_all = set.intersection(*(told_by[_told(step)] for step in path)) if path else set[T]()
        if any(len(paths[other]) > len(path) for other in tell_all):
            found.add(name)
    return found


def _told(step: Step) -> int:
    return hash((step.prompt_token_ids, step.completion_token_ids))
