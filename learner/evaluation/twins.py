"""Twins of an adapter: for each fold one that was trained as it was, and never saw the fold.

The gate that let the adapter pass has noted them, with all demonstrations that each has seen, in its own training and
in those of the twins that it goes on from. So a demonstration judges only where neither contestant has seen it, even if
it has come into another fold since: what is imported later may show that two demonstrations are of one task.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from learner.evaluation.folds import NUM_FOLDS
from policies.types import BASE_ADAPTER
from runtime.store.learning_log import LearningReader

NOTED = "twins"
"""Where the evidence of a decision keeps them."""


@dataclass(frozen=True, slots=True)
class Twin:
    """What an adapter would be if a fold did not exist."""

    adapter: str
    has_seen: frozenset[str] = frozenset()
    """Demonstrations, by their episodes."""


def twins_of(adapter: str, log: LearningReader) -> dict[int, Twin]:
    """By fold. The base network has seen nothing and is its own; an adapter that no gate judged by folds has none."""
    if adapter == BASE_ADAPTER:
        return dict.fromkeys(range(NUM_FOLDS), Twin(BASE_ADAPTER))
    noted = [item for decision in log.decisions_on(adapter) for item in decision["evidence"].get(NOTED, {}).items()]
    return {int(fold): Twin(name, frozenset(has_seen)) for fold, (name, has_seen) in noted}


def as_evidence(twins: Mapping[int, Twin]) -> dict[str, Any]:
    noted = {str(fold): [twin.adapter, sorted(twin.has_seen)] for fold, twin in twins.items()}
    return {NOTED: noted} if noted else {}


def needed_later(cycles: Iterable[str], log: LearningReader) -> set[str]:
    """Names of the twins of what these cycles' gates let pass: the next gate cannot do without them."""
    passed = [each["evidence"] for cycle in cycles for each in log.decisions(cycle) if each["promote"]]
    return {name for evidence in passed for name, _ in evidence.get(NOTED, {}).values()}
