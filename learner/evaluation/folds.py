"""Cross-fitting: every demonstration judges, and none judges an adapter that was trained on it.

Where few demonstrations are held out, the others judge too. They are dealt into folds; for each fold one adapter is
trained without it, from a twin of the acting adapter that was trained without it as well, and the two are tried on it.
What they show is what the recipe gains (Stone 1974, cross-validatory choice). The adapter that is served is trained on
all folds; it is itself tried on the held-out demonstrations and on what must not be forgotten.

The name alone decides the fold, so that a demonstration stays in it, cycle after cycle, whatever else is imported: a
twin goes on from a twin that has not seen the fold either. Folds of equal size were refused: they would have to move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from learner.data.held_out import place_of

NUM_FOLDS = 3
"""Each costs a training on two thirds of the demonstrations; two would train on half of them only."""
ENOUGH_HELD_OUT = 24
"""With so many held-out demonstrations no folds are needed: they show a gain of 15 points."""

Item = TypeVar("Item")


def fold_of(name: str, num_folds: int = NUM_FOLDS) -> int:
    """From 0. Independent of what is held out."""
    return min(int(place_of(f"fold {name}") * num_folds), num_folds - 1)


def num_folds_for(num_held_out: int, num_others: int) -> int:
    """How many folds a gate needs; 0: the held-out demonstrations will do, or there is nothing to train on."""
    return 0 if num_held_out >= ENOUGH_HELD_OUT or num_others == 1 else NUM_FOLDS


def without(fold: int, items: Sequence[Item], names: Sequence[str], num_folds: int = NUM_FOLDS) -> list[Item]:
    """What the adapters of a fold are trained on: everything but the fold. `names` is parallel to the items."""
    return [item for item, name in zip(items, names, strict=True) if fold_of(name, num_folds) != fold]
