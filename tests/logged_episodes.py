"""Steps of episodes, to be logged."""

from __future__ import annotations

from policies.types import FinalAnswer, FinishReason, SamplingParams
from runtime.store.episodes import Step, StopReason, new_id


def step(episode_id: str, parent: Step | None = None, step_id: str = "", asked: str = "") -> Step:
    question = {"role": "user", "content": asked or f"What next in {episode_id}?"}
    return Step(
        id=step_id or new_id("step"), episode_id=episode_id, parent_id=parent.id if parent else None,
        index=parent.index + 1 if parent else 0, new_messages=(question,), tools=(), prompt_token_ids=(1, 2),
        completion_token_ids=(3, 4), behavior_logprobs=(-0.1, -0.2), sampling=SamplingParams(), adapter="base",
        action=FinalAnswer("This."), finish_reason=FinishReason.STOP, stop_reason=StopReason.FINAL_ANSWER,
        tool_results=(), conversation_digest=new_id("digest"), created_at=0.0, first_token_ms=0.0, latency_ms=0.0,
    )  # fmt: skip
