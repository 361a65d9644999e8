"""Made-up episodes and steps, to be logged."""

from __future__ import annotations

import time
from typing import Any

from policies.types import (
    FinalAnswer,
    FinishReason,
    SamplingParams,
)
from runtime.store.episodes import (
    Actor,
    Episode,
    Purpose,
    Step,
    StopReason,
    new_id,
)


def make_episode(**fields: Any) -> Episode:
    return Episode(**{"id": new_id("ep"), "actor": Actor.POLICY, "purpose": Purpose.SERVE, "adapter": "base"} | fields)


def make_step(episode: Episode, parent: Step | None = None, **fields: Any) -> Step:
    """A step whose prompt extends its parent's tokens by three."""
    seen = parent.prompt_token_ids + parent.completion_token_ids if parent else ()
    defaults = {
        "id": new_id("step"),
        "episode_id": episode.id,
        "parent_id": parent.id if parent else None,
        "index": parent.index + 1 if parent else 0,
        "new_messages": ({"role": "user", "content": "hello"},),
        "tools": (WEATHER_TOOL,),
        "prompt_token_ids": (*seen, 7, 8, 9),
        "completion_token_ids": (5, 6),
        "behavior_logprobs": (-0.5, -0.25),
        "sampling": SamplingParams(),
        "adapter": "base",
        "action": FinalAnswer("hi"),
        "finish_reason": FinishReason.STOP,
        "stop_reason": StopReason.FINAL_ANSWER,
        "tool_results": (),
        "conversation_digest": "digest",
        "created_at": time.time(),
        "first_token_ms": 1.0,
        "latency_ms": 2.0,
    }
    return Step(**defaults | fields)


def make_chain(episode: Episode, num_steps: int) -> list[Step]:
    steps: list[Step] = []
    for _ in range(num_steps):
        steps.append(make_step(episode, steps[-1] if steps else None))
    return steps


WEATHER_TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
