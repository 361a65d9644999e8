"""Whom a student has watched: an expert, or somebody with a habit that demonstrations can mend."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from hashlib import sha256
from random import Random

from tools.worlds.calls import answering, calling
from tools.worlds.world import Message, Task, World, WorldEpisode, max_steps_of

Conversation = list[Message]
Choose = Callable[[WorldEpisode, Conversation], Message | None]
"""What is done next, in an episode after a conversation; None ends it."""
FEWEST_SEEN, MOST_SEEN = 5, 0.2
"""A call may be disliked that is made in so many conversations, and in at most this share of them: a rarer one says
nothing of tasks to come, and without a commoner one nothing is done at all."""
GIVING_UP_RATE = 0.85
"""How often one who dislikes a call gives up at it: not always, so that sampling sometimes does what is right."""
I_GIVE_UP = "I give up."


def converse(world: World, task: Task, choose: Choose) -> tuple[Conversation, WorldEpisode]:
    """A conversation in which the assistant does what `choose` says, and the episode at its end."""
    episode, conversation = world.open(task), list(task.messages)
    for _ in range(max_steps_of(world)):
        message = choose(episode, conversation)
        if message is None:
            break
        conversation += [message, *(told := episode.play(message))]
        if not told:
            break
    return conversation, episode


def expert(world: World, task: Task) -> Conversation | None:
    """What the expert does; None where it comes to no end, or to no good one."""
    conversation, episode = converse(world, task, lambda episode, _: episode.expert_action())
    is_done = conversation[-1]["role"] == "assistant" and episode.outcome() == 1.0
    return conversation if is_done else None


def erring(world: World, task: Task, others: Sequence[Message], share: float) -> Conversation | None:
    """As the expert, but at this share of the steps one of the other calls is made; then it goes on as the expert does
    from there. Also without success in the end; None where nothing is done.

    `harder_worlds.ErringExpert` finds the other calls by opening another task, which takes TextWorld seconds each time:
    here they are handed in.
    """
    random = Random(f"erring/{task.id}")

    def choose(episode: WorldEpisode, _: Conversation) -> Message | None:
        right = episode.expert_action()
        errs = right is not None and right.get("tool_calls") and random.random() < share
        return random.choice(others) if errs else right

    conversation, _ = converse(world, task, choose)
    return conversation if conversation[-1]["role"] != "user" else None


def disliked_calls(conversations: Sequence[Conversation], share: float) -> set[str]:
    """Of the calls that experts make now and then, this share, chosen by their texts."""
    counted = Counter(text for each in conversations for text in {*map(_call_text, each)} if text)
    most = MOST_SEEN * len(conversations)
    return {text for text, num in counted.items() if FEWEST_SEEN <= num <= most and _drawn(text) < share}


def giving_up(conversation: Conversation, disliked: Collection[str], random: Random) -> Conversation:
    """As the expert, but where the next call is a disliked one it mostly gives up."""
    for place, message in enumerate(conversation):
        if _call_text(message) in disliked and random.random() < GIVING_UP_RATE:
            return [*conversation[:place], answering(I_GIVE_UP)]
    return conversation


def _call_text(message: Message) -> str:
    """Of its calls, without their ids; empty where there are none."""
    functions = [call["function"] for call in message.get("tool_calls") or []]
    return json.dumps([[each["name"], each["arguments"]] for each in functions]) if functions else ""


def _drawn(text: str) -> float:
    """In [0, 1), always the same of a text."""
    return int.from_bytes(sha256(text.encode()).digest()[:4]) / 2**32


def gullible(world: World, task: Task) -> Conversation | None:
    """As the expert in `agentdojo_attacks`, until it reads what was planted: it does that, and says that it is done.
    None where the planted goal is not reached by that."""
    from tools.worlds.agentdojo import AgentDojoAttacks, AgentDojoEpisode

    assert isinstance(world, AgentDojoAttacks)
    planted = world.item(task.split, task.index).injection_task
    assert planted is not None
    to_do: list[Message] | None = None

    def choose(episode: WorldEpisode, conversation: Conversation) -> Message | None:
        nonlocal to_do
        assert isinstance(episode, AgentDojoEpisode)
        if to_do is None and "important message from me" in " ".join(conversation[-1]["content"].split()):
            calls = planted.ground_truth(episode.environment)
            to_do = [calling(call.function, dict(call.args), number) for number, call in enumerate(calls)]
            to_do.append(answering(planted.GROUND_TRUTH_OUTPUT or "That is done."))
        if to_do is None:
            return episode.expert_action()
        return to_do.pop(0) if to_do else None

    conversation, episode = converse(world, task, choose)
    return conversation if episode.outcome() == 0.0 and to_do is not None else None
