"""Recognises a conversation: which logged step a request continues, and all that was said before it.

A client sends its whole conversation each time. Its longest beginning that ends with a logged answer is where the
request goes on; an unknown one begins an episode. The log's own version of the history is the one that counts: it
also holds the calls and results of tools that the server ran, which the client never saw.

Clients rewrite what they send: a clock in the system message, another agent's instructions, calls replayed as text,
history left out or summed up. Such a request is recognised by less (see `_MARKS`), continues its episode, and is
rendered afresh from what its client says now. What is recognised by less must also be alone: where two conversations
could be meant, none is. Only what was logged for the same key and user is looked at.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import orjson

from policies.chat.chat_protocol import action_message, text_of
from policies.types import Action, MalformedAction, Message
from runtime.store.damage import Damaged
from runtime.store.episodes import PromptChange, Step, ToolResult, new_messages_along
from runtime.store.step_log import Mark, MarkedStep, StepLog, Whose

LEGACY_CALL_ID = "function_call"
"""Stands for the id of a call in OpenAI's older form, which has none."""

_OWN_CALL_ID = re.compile(r"\bcall_[0-9a-f]{24}\b")
"""Ids that this server makes. They are random: two conversations never share one."""

_ADDED = "added"
"""Key of what a client put behind an answer: no part of the answer, but perhaps the calls of it as text."""

_FEWEST_LETTERS = 40
"""Of a message and its answer, for them to say which conversation they are from. "Thanks." and "You're welcome." do
not."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request stands in the log."""

    path: tuple[Step, ...]
    """The logged steps it continues, first to last; empty for a new conversation."""
    history: tuple[Message, ...]
    """The conversation of that path, up to and including its last action; empty where the client changed it."""
    new_messages: tuple[Message, ...]
    """What the client added; where it changed what was said before, all that the policy is to see."""
    change: PromptChange | None = None
    """What the client changed of the conversation that it continues."""


def locate(log: StepLog, messages: Sequence[Message], whose: Whose, stops: Sequence[str] = ()) -> Place:
    """Where a conversation goes on, in the named episode if one is named, else among its user's.

    `stops` are the client's stop texts: it may have gone on where they cut an answer.
    """
    as_cut = [_without_stop(message, stops) for message in messages] if stops else messages
    try:
        place = _place(log, as_cut, whose)
    except Damaged as damaged:  # what was logged of it can no longer be read: it begins anew
        log.damage.note(damaged)
        return Place((), (), tuple(messages))
    if place.path and as_cut != messages:
        return Place(place.path, (), tuple(messages), PromptChange.HISTORY)
    return place


def _without_stop(message: Message, stops: Sequence[str]) -> Message:
    """An answer up to its first stop text: what follows, no answer of this server's has said."""
    text = text_of(message)
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    if not ends or message["role"] != "assistant":
        return message
    return {**message, "content": text[: min(ends)], _ADDED: text[min(ends) :]}


def _place(log: StepLog, messages: Sequence[Message], whose: Whose) -> Place:
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for at, kind, step_id in _recognised(log, messages, answers, whose):
        path = tuple(log.path_to(step_id))
        if kind is Mark.CONVERSATION:
            return Place(path, history_of(path), tuple(messages[at + 1 :]))
        if kind is not Mark.THREAD:
            later = [messages[each] for each in answers if each > at]
            followed = _followed(log, path, later)
            if kind is Mark.TAIL and len(followed) < len(path) + len(later):
                continue  # what comes after it is of another conversation
            return Place(followed, (), tuple(messages), PromptChange.HISTORY)
        return _with_other_system(path, messages, at)
    return _after_newest(log, messages, whose)


def continued(log: StepLog, messages: Sequence[Message], previous: Step) -> Place:
    """The place right after a logged step, whose history the messages begin with, perhaps under other instructions."""
    path = tuple(log.path_to(previous.id))
    history = history_of(path)
    if tuple(messages[: len(history)]) == history:
        return Place(path, history, tuple(messages[len(history) :]))
    return Place(path, (), tuple(messages), PromptChange.SYSTEM)


def messages_after(action: Action, tool_results: Sequence[ToolResult]) -> tuple[Message, ...]:
    """What the server itself tells the policy after an action: tool results, or what was wrong with the action."""
    if isinstance(action, MalformedAction):
        advice = f"Your last message could not be read as an action: {action.problem}. Try again."
        return ({"role": "user", "content": advice},)
    return tuple({"role": "tool", "tool_call_id": r.tool_call_id, "content": r.content} for r in tool_results)


def history_of(path: Sequence[Step]) -> tuple[Message, ...]:
    """The whole conversation behind a path of logged steps, up to and including the last action."""
    return tuple(
        message
        for step, new_messages in new_messages_along(path)
        for message in (*new_messages, action_message(step.action))
    )


@dataclass(frozen=True, slots=True)
class Digests:
    """What a follow-up of a step is recognised by; empty for a step that no answer ended with."""

    conversation: str = ""
    thread: str = ""
    tail: str = ""

    @classmethod
    def of(cls, messages: Sequence[Message]) -> Digests:
        """`messages` is the conversation as the client has it, up to and including the answer."""
        return cls(digests_of(messages)[-1], thread_digests_of(messages)[-1], tail_digest_of(messages))


# ------------------------------------------------------------------------------------------ finding the step


def _recognised(
    log: StepLog, messages: Sequence[Message], answers: Sequence[int], whose: Whose
) -> list[tuple[int, Mark, str]]:
    """(index of the answer in the messages, by what it is known, step id): the last answer first, surest mark first."""
    if not answers:
        return []
    exact = _known(log, Mark.CONVERSATION, digests_of(messages), answers, whose, _newest)
    if exact and exact[0][0] == answers[-1]:  # the usual case
        return exact
    said = accumulate(_letters([message]) for message in messages)
    threads = [
        digest if letters >= _FEWEST_LETTERS else ""
        for digest, letters in zip(thread_digests_of(messages), said, strict=True)
    ]
    tails = [_tail_digest(pair) for pair in _tails(messages)]
    found = [
        *exact,
        *_known(log, Mark.THREAD, threads, answers, whose, _newest),
        *_called(log, messages, answers, whose),
        *_known(log, Mark.TAIL, tails, answers, whose, _only),
    ]
    return sorted(found, key=lambda each: -each[0])  # stable: at one place the surest mark stays first


def _known(
    log: StepLog, mark: Mark, marks: Sequence[str], answers: Sequence[int], whose: Whose, choose: _Choice
) -> list[tuple[int, Mark, str]]:
    """The answers that a logged step bears the mark of; `marks` is parallel to the messages."""
    wanted = {marks[at]: at for at in answers if marks[at]}
    found: dict[int, list[MarkedStep]] = {}
    for step in log.marked_steps(mark, wanted, whose) if wanted else ():
        found.setdefault(wanted[step.mark], []).append(step)
    chosen = {at: choose(steps) for at, steps in found.items()}
    return [(at, mark, step.step_id) for at, step in sorted(chosen.items(), reverse=True) if step is not None]


def _called(
    log: StepLog, messages: Sequence[Message], answers: Sequence[int], whose: Whose
) -> list[tuple[int, Mark, str]]:
    """The last answer that shows the id of a call that this server made, in whatever form."""
    ids = {at: _own_call_ids(messages[at]) for at in answers}
    wanted = {call_id for of in ids.values() for call_id in of}
    steps = log.marked_steps(Mark.CALL, wanted, whose) if wanted else []
    by_id = {step.mark: step.step_id for step in steps}
    known = [(at, by_id[call_id]) for at, of in ids.items() for call_id in of if call_id in by_id]
    return [(at, Mark.CALL, step_id) for at, step_id in known[-1:]]


_Choice = Callable[[Sequence[MarkedStep]], MarkedStep | None]


def _newest(steps: Sequence[MarkedStep]) -> MarkedStep:
    """Of steps whose conversations are equal: one that nobody has continued, so that two of them stay two."""
    return next((step for step in steps if not step.is_continued), steps[0])


def _only(steps: Sequence[MarkedStep]) -> MarkedStep | None:
    """The step, unless several conversations could be meant."""
    return _newest(steps) if len({step.episode_id for step in steps}) == 1 else None


def _followed(log: StepLog, path: tuple[Step, ...], answers: Sequence[Message]) -> tuple[Step, ...]:
    """Along the steps that gave these answers, too: ones that say too little to be recognised by themselves."""
    for answer in answers:
        given = [step for step in log.children(path[-1].id) if _gist(action_message(step.action)) == _gist(answer)]
        if not given:
            break
        path = (*path, given[-1])
    return path


def _with_other_system(path: Sequence[Step], messages: Sequence[Message], at: int) -> Place:
    """The logged conversation under the client's system messages; all as the client has it where others follow."""
    history = history_of(path)
    systems, others = _leading_systems(messages), _leading_systems(history)
    rest, logged = messages[len(systems) : at + 1], history[len(others) :]
    if any(message["role"] == "system" for message in (*rest, *logged)):
        return Place(tuple(path), (), tuple(messages), PromptChange.HISTORY)
    return Place(tuple(path), (), (*systems, *logged, *messages[at + 1 :]), PromptChange.SYSTEM)


def _leading_systems(messages: Sequence[Message]) -> tuple[Message, ...]:
    end = next((at for at, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return tuple(messages[:end])


def _after_newest(log: StepLog, messages: Sequence[Message], whose: Whose) -> Place:
    """A conversation that nothing is known of: it goes on in the episode that is named, or begins one."""
    steps = [] if whose.episode_id is None else log.steps(whose.episode_id)
    asked_again = [step for step in steps if digests_of(step.new_messages)[-1:] == digests_of(messages)[-1:]]
    if not steps or any(step.parent_id is None for step in asked_again):
        return Place((), (), tuple(messages))
    newest = asked_again[-1].parent_id if asked_again else steps[-1].id
    assert newest is not None
    return Place(tuple(log.path_to(newest)), (), tuple(messages), PromptChange.HISTORY)


# ------------------------------------------------------------------------------------ what is said the same


def digests_of(messages: Sequence[Message]) -> list[str]:
    """One digest for each beginning of a conversation: the k-th covers messages[: k + 1].

    Covers what a client sends back unchanged: roles, texts, tool calls with their ids, and nothing of formatting, nor
    of white space around a text.
    """
    return _chained(_essence(message) for message in messages)


def thread_digests_of(messages: Sequence[Message]) -> list[str]:
    """The same without system messages, without foreign ids, and however white space stands; parallel to messages."""
    return _chained(None if message["role"] == "system" else _gist(message) for message in messages)


def tail_digest_of(messages: Sequence[Message]) -> str:
    """Of an answer and what it answers, as a thread's; empty where they say too little to be recognised by."""
    return _tail_digest(_tails(messages)[-1])


def _tails(messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    """For each beginning of a conversation its last two messages, those of the system aside."""
    tails, pair = list[tuple[Message, ...]](), ()
    for message in messages:
        if message["role"] != "system":
            pair = (*pair[-1:], message)
        tails.append(pair)
    return tails


def _tail_digest(pair: Sequence[Message]) -> str:
    if len(pair) < 2 or _letters(pair) < _FEWEST_LETTERS:
        return ""
    return _chained(_gist(message) for message in pair)[-1]


def _chained(essences: Iterable[list[object] | None]) -> list[str]:
    """A digest for each, of all up to it; None adds nothing."""
    digests, chain = [], hashlib.sha256()
    for essence in essences:
        if essence is not None:
            chain.update(orjson.dumps(essence, option=orjson.OPT_SORT_KEYS) + b"\n")
        digests.append(chain.copy().hexdigest())
    return digests


def _essence(message: Message) -> list[object]:
    calls = [[_id(call.get("id")), *_said(call)] for call in _calls(message)]
    return [message["role"], text_of(message).strip(), _id(message.get("tool_call_id")), calls]


def _gist(message: Message) -> list[object]:
    calls = [[_own_id(call.get("id")), *_said(call)] for call in _calls(message)]
    return [message["role"], " ".join(text_of(message).split()), _own_id(message.get("tool_call_id")), calls]


def _letters(messages: Sequence[Message]) -> int:
    """How much is said; an id that this server made says all that has to be said."""
    ids = sum(len(call.get("id") or "") for message in messages for call in _calls(message))
    return ids + sum(len(text_of(message)) for message in messages if message["role"] != "system")


def _own_call_ids(message: Message) -> list[str]:
    """Ids of calls that this server made, as calls or in a text that replays them."""
    written = [call.get("id") or "" for call in _calls(message)]
    return _OWN_CALL_ID.findall(" ".join([*written, text_of(message), message.get(_ADDED, "")]))


def _calls(message: Message) -> list[Message]:
    return message.get("tool_calls") or []


def _id(call_id: str | None) -> str | None:
    return None if call_id == LEGACY_CALL_ID else call_id


def _own_id(call_id: str | None) -> str | None:
    return call_id if call_id and _OWN_CALL_ID.fullmatch(call_id) else None


def _said(call: Message) -> list[object]:
    return [call["function"]["name"], _canonical(call["function"].get("arguments"))]


def _canonical(arguments: object) -> object:
    try:
        return orjson.loads(arguments) if isinstance(arguments, str) else arguments
    except orjson.JSONDecodeError:
        return arguments
