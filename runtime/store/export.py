"""Logged episodes in other people's formats: ATIF trajectories, OpenAI's fine-tuning, TRL's preferences, traces.

Pure conversions of what the log holds, for `python -m learner export` and for `GET /v1/export`; both floors may import
the store. An episode with branches is one conversation for each of its ends; a step that stands in several of them is
learned in the first one only. Where a client changed what had been said before (a clock in its system message, a
shortened history), another conversation begins: it has what the client then sent, as the policy saw it. What could not
be read as an action is kept as it was said, and marked as not to be learned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from policies.chat.chat_protocol import action_message, text_of
from policies.types import MalformedAction, Message, ToolSchema
from runtime import __version__
from runtime.store.damage import Damaged
from runtime.store.episodes import Actor, Episode, Outcome, Purpose, Step
from runtime.store.learning_log import LearningReader
from runtime.store.step_log import StepLog

Row = dict[str, Any]
_PAGE = 200


@dataclass(frozen=True, slots=True)
class ExportFilter:
    """Which episodes are exported; None does not ask."""

    purpose: Purpose | None = None
    actor: Actor | None = None
    adapter: str | None = None
    task_prefix: str | None = None
    since: float | None = None
    """Unix seconds: episodes that began then or later."""
    min_outcome: float | None = None
    """The newest outcome is at least this; an episode without one is left out."""
    owner: str | None = None
    """Name of the key that they belong to."""
    agent: str | None = None
    """The agent that acts in them, or that they demonstrate something to; empty: the server's own."""


@dataclass(frozen=True, slots=True)
class Branch:
    """One conversation of an episode, from its first message to one of its ends."""

    episode: Episode
    path: tuple[Step, ...]
    new: frozenset[str]
    """Ids of the steps that stand in no branch before this one."""
    outcomes: tuple[Outcome, ...]
    rewards: dict[str, list[Row]]
    """By step: `cycle`, `source`, `value`."""

    @property
    def name(self) -> str:
        """Of its last step where the episode has several ends."""
        return self.path[-1].id

    @property
    def learned(self) -> frozenset[str]:
        """Ids of the steps that are to be learned here."""
        return frozenset(s.id for s in self.path if s.id in self.new and not isinstance(s.action, MalformedAction))

    @property
    def tools(self) -> list[ToolSchema]:
        return list(self.path[-1].tools)


def export(log: StepLog, learning_log: LearningReader | None, wanted: ExportFilter, form: str) -> Iterator[Row]:
    """The rows of a format, of the newest episode first. `form` is a key of FORMATS.

    An episode with a damaged step is left out, and noted by the log. So is one that is erased before its rows are
    handed over.
    """
    convert = FORMATS[form]
    for episode in _episodes(log, wanted):
        try:
            rows = [row for branch in _branches(log, learning_log, episode) for row in convert(branch, log)]
        except Damaged as damaged:
            log.damage.note(damaged)
            continue
        if not log.erased_among([episode.id]):
            yield from rows


def _episodes(log: StepLog, wanted: ExportFilter) -> Iterator[Episode]:
    after: str | None = None
    while page := log.episodes(
        after, _PAGE, wanted.purpose, wanted.actor, wanted.adapter, wanted.task_prefix, wanted.owner, wanted.agent
    ):
        for episode in page:
            outcomes = log.outcomes(episode.id) if wanted.min_outcome is not None else []
            is_good = wanted.min_outcome is None or (outcomes and outcomes[-1].value >= wanted.min_outcome)
            if is_good and (wanted.since is None or episode.created_at >= wanted.since):
                yield episode
        after = page[-1].id


def _branches(log: StepLog, learning_log: LearningReader | None, episode: Episode) -> Iterator[Branch]:
    steps = log.steps(episode.id)
    outcomes = tuple(log.outcomes(episode.id))
    rewards: dict[str, list[Row]] = {}
    for reward in learning_log.rewards_of(episode.id) if learning_log is not None else ():
        said = {"cycle": reward.cycle, "source": reward.source.value, "value": reward.value}
        rewards.setdefault(reward.step_id, []).append(said)
    by_id = {step.id: step for step in steps}
    continued = {step.parent_id for step in steps if step.prompt_change is None}
    seen: set[str] = set()
    for end in (step for step in steps if step.id not in continued):
        path = _conversation_to(end, by_id, log)
        new = frozenset(step.id for step in path) - seen
        seen |= new
        yield Branch(episode, path, new, outcomes, rewards)


def _conversation_to(end: Step, by_id: Mapping[str, Step], log: StepLog) -> tuple[Step, ...]:
    """The steps from the first one of its conversation on: an episode's, or the last that changed what was said."""
    path = [end]
    while path[-1].prompt_change is None and path[-1].parent_id is not None and len(path) <= end.index:
        parent = by_id.get(path[-1].parent_id) or log.step(path[-1].parent_id)
        if parent is None:
            break
        path.append(parent)
    return tuple(reversed(path))


def _conversation(branch: Branch) -> tuple[list[Message], list[int]]:
    """(messages, indices of those that are learned)."""
    messages: list[Message] = []
    learned = []
    for step in branch.path:
        messages += step.new_messages
        if step.id in branch.learned:
            learned.append(len(messages))
        messages.append(action_message(step.action))
    return messages, learned


# ------------------------------------------------------------------------------- OpenAI, Hugging Face, TRL


def _openai(branch: Branch, _: StepLog) -> Iterator[Row]:
    """A line of OpenAI's fine-tuning: what is not to be learned has the weight 0."""
    messages, learned = _conversation(branch)
    if learned:
        marked = [
            {**message, "weight": 0} if message["role"] == "assistant" and index not in learned else message
            for index, message in enumerate(messages)
        ]
        yield {"messages": marked, **({"tools": branch.tools} if branch.tools else {})}


def _session(branch: Branch, _: StepLog) -> Iterator[Row]:
    """Hugging Face's session traces: a header and a line for each message."""
    messages, learned = _conversation(branch)
    about = {
        "episode_id": branch.episode.id,
        "adapter": branch.episode.adapter,
        "purpose": branch.episode.purpose.value,
    }
    about |= {"outcome": branch.outcomes[-1].value} if branch.outcomes else {}
    header: Row = {"type": "session", "harness": "stepagent", "id": branch.name, "metadata": about}
    header |= {"learn_from": learned} | ({"tools": branch.tools} if branch.tools else {})
    yield header | ({"task": branch.episode.task} if branch.episode.task else {})
    yield from ({"type": "message", "message": message} for message in messages)


def _preferences(branch: Branch, log: StepLog) -> Iterator[Row]:
    """TRL's preference rows: where a person corrected a step, the correction is chosen and the step is rejected.

    Arguments of calls are objects, as chat templates read them: of a text they would make a text of JSON in JSON.
    """
    messages: list[Message] = []
    for step in branch.path:
        messages += [_with_objects(message) for message in step.new_messages]
        taken = _with_objects(action_message(step.action))
        corrections = log.corrections(step.id) if step.id in branch.new else []
        chosen = _with_objects(action_message(corrections[-1].action)) if corrections else taken
        if not _says_the_same(chosen, taken):
            row: Row = {"prompt": list(messages), "chosen": [chosen], "rejected": [taken]}
            yield row | ({"tools": list(step.tools)} if step.tools else {})
        messages.append(taken)


def _says_the_same(one: Message, other: Message) -> bool:
    """But for the ids of calls and for thinking."""
    said = [(each["content"], [call["function"] for call in each.get("tool_calls", ())]) for each in (one, other)]
    return said[0] == said[1]


def _with_objects(message: Message) -> Message:
    """The message with the arguments of its calls as objects."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _arguments(call["function"].get("arguments"))}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


# ---------------------------------------------------------------------------------------------------- ATIF


def _atif(branch: Branch, _: StepLog) -> Iterator[Row]:
    """An ATIF 1.8 trajectory: token ids, logprobs, and under `extra.stepagent` adapters, rewards and outcomes."""
    episode = branch.episode
    steps: list[Row] = []
    for step in branch.path:
        for message in step.new_messages:
            _add_message(steps, message)
        steps.append(_agent_step(branch, step, len(steps) + 1))
    for result in branch.path[-1].tool_results:
        _add_result(steps, result.tool_call_id, result.content)
    about = {
        "episode_id": episode.id,
        "actor": episode.actor.value,
        "purpose": episode.purpose.value,
        "adapter": episode.adapter,
        "outcomes": [{"value": o.value, "source": o.source, "note": o.note} for o in branch.outcomes],
    }
    agent: Row = {"name": "stepagent", "version": __version__, "model_name": episode.adapter}
    yield {
        "schema_version": "ATIF-v1.8",
        "session_id": episode.id,
        "trajectory_id": branch.name,
        "agent": agent | ({"tool_definitions": branch.tools} if branch.tools else {}),
        "steps": steps,
        "extra": {"stepagent": about | ({"task": episode.task} if episode.task else {})},
    }


def _agent_step(branch: Branch, step: Step, number: int) -> Row:
    about: Row = {"step_id": step.id, "adapter": step.adapter, "is_learned": step.id in branch.learned}
    about |= {"rewards": branch.rewards[step.id]} if step.id in branch.rewards else {}
    about |= {"problem": step.action.problem} if isinstance(step.action, MalformedAction) else {}
    metrics: Row = {
        "prompt_tokens": len(step.prompt_token_ids),
        "completion_tokens": len(step.completion_token_ids),
        "prompt_token_ids": list(step.prompt_token_ids),
        "completion_token_ids": list(step.completion_token_ids),
    }
    metrics |= {} if step.behavior_logprobs is None else {"logprobs": list(step.behavior_logprobs)}
    return {
        **_said(action_message(step.action), number),
        "timestamp": datetime.fromtimestamp(step.created_at, UTC).isoformat(),
        "model_name": step.adapter,
        "metrics": metrics,
        "extra": {"stepagent": about},
    }


def _add_message(steps: list[Row], message: Message) -> None:
    """One message that the agent saw: a step of its own, or a result of the agent's step before."""
    match message["role"]:
        case "tool":
            _add_result(steps, message.get("tool_call_id"), text_of(message))
        case "assistant":  # the client told it, and this agent did not say it
            steps.append(_said(message, len(steps) + 1) | {"is_copied_context": True})
        case role:
            source = "user" if role == "user" else "system"
            steps.append({"step_id": len(steps) + 1, "source": source, "message": text_of(message)})


def _add_result(steps: list[Row], call_id: str | None, content: str) -> None:
    last = steps[-1] if steps else None
    if last is None or last["source"] != "agent":
        steps.append({"step_id": len(steps) + 1, "source": "system", "message": content})
        return
    known = {call["tool_call_id"] for call in last.get("tool_calls", ())}
    result: Row = {"content": content} | ({"source_call_id": call_id} if call_id in known else {})
    last.setdefault("observation", {"results": []})["results"].append(result)


def _said(message: Message, number: int) -> Row:
    step: Row = {"step_id": number, "source": "agent", "message": text_of(message)}
    if message.get("reasoning_content"):
        step["reasoning_content"] = message["reasoning_content"]
    if message.get("tool_calls"):
        step["tool_calls"] = [
            {
                "tool_call_id": call["id"],
                "function_name": call["function"]["name"],
                "arguments": _arguments(call["function"].get("arguments")),
            }
            for call in message["tool_calls"]
        ]
    return step


def _arguments(text: Any) -> Row:
    """ATIF wants an object; what a client wrote otherwise is kept as text within one."""
    try:
        read = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        read = text
    return read if isinstance(read, dict) else {"arguments": read} if read else {}


FORMATS: dict[str, Callable[[Branch, StepLog], Iterator[Row]]] = {
    "atif": _atif,
    "openai": _openai,
    "trl": _preferences,
    "hf": _session,
}
