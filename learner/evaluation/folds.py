"""Cross-fitting: every demonstration judges, and none judges an adapter that was trained on it.

Where few demonstrations are held out, the others judge too. They are dealt into folds; for each fold one adapter is
trained without it, from a twin of the acting adapter that was trained without it as well, and the two are tried on it.
What they show is what the recipe gains (Stone 1974, cross-validatory choice). The adapter that is served is trained on
all folds; it is itself tried on the held-out demonstrations and on what must not be forgotten.

The name alone decides the fold, so that a demonstration stays in it, cycle after cycle, whatever else is imported: a
twin goes on from a twin that has not seen the fold either. Folds of equal size were refused: they would have to move.
"""

from __future__ import annotations

from collections.abc import Mapping

from learner.data.held_out import place_of

NUM_FOLDS = 3
"""Each costs a training on two thirds of the demonstrations; two would train on half of them only."""
ENOUGH_HELD_OUT = 24
"""With so many held-out demonstrations no folds are needed: they show a gain of 15 points."""


def fold_of(group: str) -> int:
    """The fold of a task's demonstrations, from 0. Independent of what is held out."""
    return int(place_of(f"fold {group}") * NUM_FOLDS)


def needs_folds(num_held_out: int) -> bool:
    """Whether the demonstrations that are trained on must judge too."""
    return num_held_out < ENOUGH_HELD_OUT


def left_out(fold: int, groups_of: Mapping[str, frozenset[str]]) -> set[str]:
    """Ids of the episodes, demonstrations and the policy's own, that the adapters of a fold must not be trained on.

    `groups_of`: of `learner.data.collect.Collected`.
    """
    return {episode for episode, groups in groups_of.items() if any(fold_of(group) == fold for group in groups)}
