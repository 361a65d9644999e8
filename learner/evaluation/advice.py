"""What to do about a candidate that shows no gain: a bare "gain +0.0%" leaves a user who has no world with nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learner.evaluation.evidence import TASKS

LEARNED = 2.0
"""Perplexity after training, at most, of what has learned its demonstrations: less than a coin toss a token is open."""
SUCCEEDS_AT_NONE = (
    "the acting adapter succeeds at none, so whole tasks say little: --learner-arg gate-tasks=0 lets demonstrations "
    "decide, step by step"
)


def advice(evidence: Mapping[str, Any], perplexity: float | None) -> str:
    """What is wrong, and what to do; empty where nothing stands out.

    `evidence`: of a decision on trials. `perplexity`: the candidate's on its training data; None where not measured.
    """
    of_tasks = evidence["unit"] == TASKS
    found = [SUCCEEDS_AT_NONE] if of_tasks and not evidence["acting_score"] else []
    if symptoms := _symptoms(evidence, of_tasks):
        found.append(f"{', and '.join(symptoms)}: {_remedy(perplexity)}")
    return "; ".join(found)


def more_to_try(kind: str) -> str:
    """How more units of a kind are had."""
    if kind == TASKS:
        return "try more tasks (--learner-arg gate-tasks=N; 0 lets demonstrations decide)"
    return "import demonstrations of other tasks"


def _symptoms(evidence: Mapping[str, Any], of_tasks: bool) -> list[str]:
    symptoms = []
    if not of_tasks and not evidence["acting_score"] and not evidence["candidate_score"]:
        symptoms.append("neither acts once as the experts do")
    num_malformed, before = evidence["candidate_malformed"], evidence["acting_malformed"]
    if evidence["gain"] <= 0 and num_malformed > before:
        symptoms.append(f"{num_malformed} of the candidate's actions cannot be read (the acting adapter's: {before})")
    return symptoms


def _remedy(perplexity: float | None) -> str:
    if perplexity is not None and perplexity <= LEARNED:
        return (
            f"it has learned its demonstrations (perplexity {perplexity:.1f}) and they do not carry over: "
            "import more, of other tasks; where that does not help, the model may be too weak for them, or what it is "
            "served with (prompt, tools) not what the experts had"
        )
    measured = "" if perplexity is None else f"perplexity after training is {perplexity:.3g}, so "
    return f"{measured}train longer, with a larger --learner-arg min-gradient-steps=N or another lr=X"
