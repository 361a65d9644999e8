"""python -m benchmarks.stitching: generated conversations of clients that rewrite them, held against the truth.

A request is right where its step stands on the step that its client means (or on one whose conversation is the very
same, which nobody could tell apart); missed where it begins an episode instead; wrong where it stands on another. Steps
that stand on the right one are token-exact where their prompt begins with its tokens; else the table says why not.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.client_traffic import ANSWERS, PLACES, REWRITES, SYSTEMS, Conversation
from policies.chat.chat_protocol import ChatProtocol
from runtime.agent.tools import Toolbox
from runtime.http.app import create_app
from runtime.store.episodes import Step
from runtime.store.step_log import StepLog
from tests.serving import LIMITS, NOVICE_FOLDER, SayingEngine, parts_of


@dataclass
class Tally:
    """What became of one kind of conversations."""

    counts: Counter[str] = field(default_factory=Counter)
    why_not_exact: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Traffic:
    """Clients whose conversations are interleaved, and a server that has to tell them apart."""

    def __init__(self, log: StepLog, engine: SayingEngine, client: httpx.AsyncClient, seed: int) -> None:
        self.tallies: dict[str, Tally] = {}
        self._log = log
        self._engine = engine
        self._client = client
        self._draw = random.Random(seed)

    async def run(self, num_conversations: int, kinds: Iterable[str], at_once: int = 20) -> None:
        waiting = [kind for kind, _ in zip(_round(kinds), range(num_conversations), strict=False)]
        self._draw.shuffle(waiting)
        active = list[tuple[Conversation, int]]()
        while waiting or active:
            while waiting and len(active) < at_once:
                active += [(each, self._draw.randint(2, 6)) for each in self._conversations(waiting.pop())]
            number = self._draw.randrange(len(active))
            conversation, num_left = active[number]
            await self._turn(conversation)
            active[number] = (conversation, num_left - 1)
            active = [each for each in active if each[1] > 0]

    def _conversations(self, kind: str) -> list[Conversation]:
        one = Conversation(kind, self._draw, system=self._draw.choice(SYSTEMS))
        if kind == "named":
            one.episode = f"named-{self._draw.getrandbits(64):x}"
        if kind == "judge":
            one.pending = [{"id": call.id} for call in self._some_calls()]
        if kind == "two_users":  # they say the same words, word for word
            words = self._draw.getrandbits(64)
            return [Conversation(kind, random.Random(words), user, one.system) for user in ("Ann", "Bob")]
        if kind == "sub_agents":
            return [one, *(Conversation(kind, self._draw, system="You are a helper.") for _ in range(3))]
        return [one]

    def _some_calls(self) -> list[Any]:
        return [call for step in self._log.steps_since(None, 20) for call in getattr(step.action, "calls", ())]

    async def _turn(self, conversation: Conversation) -> None:
        if conversation.kind in ("retried", "branched") and conversation.last and self._draw.random() < 0.4:
            await self._again(conversation)
        conversation.say()
        await self._ask(conversation, conversation.last, conversation.kind)

    async def _again(self, conversation: Conversation) -> None:
        """Ask for the last answer once more, perhaps with other words."""
        answer = conversation.told.pop()
        step = self._log.step(conversation.last or "")
        assert step is not None
        if conversation.kind == "branched" and conversation.told[-1]["role"] == "user":
            conversation.told[-1]["content"] = "Or rather: what else could be there, if you think about it?"
        conversation.told.append(answer)
        conversation.told.pop()
        await self._ask(conversation, step.parent_id, conversation.kind)

    async def _ask(self, conversation: Conversation, meant: str | None, kind: str) -> None:
        self._engine.says.append(self._answer())
        headers = {"x-episode-id": conversation.episode} if conversation.episode else {}
        answer = await self._client.post("/v1/chat/completions", json=conversation.request(), headers=headers)
        assert answer.status_code == 200, answer.text
        step = self._log.step(answer.headers["x-step-id"])
        assert step is not None
        self._judge(step, meant, self.tallies.setdefault(kind, Tally()))
        conversation.heard(answer.json()["choices"][0]["message"], step.id)

    def _answer(self) -> str:
        if self._draw.random() < 0.5:
            return self._draw.choice(ANSWERS)
        at = self._draw.choice(PLACES)
        return f'<tool_call>\n{{"name": "look", "arguments": {{"at": "{at}"}}}}\n</tool_call>'

    def _judge(self, step: Step, meant_id: str | None, tally: Tally) -> None:
        found = self._log.step(step.parent_id) if step.parent_id else None
        meant = self._log.step(meant_id) if meant_id else None
        if meant is None and found is None:
            tally.counts["begun"] += 1
        elif found is None:
            tally.counts["missed"] += 1
        elif meant is None or not self._is_as_meant(found, meant):
            tally.counts["wrong"] += 1
            tally.wrong.append(f"{step.id} stands on {found.id} and not on {meant_id} ({step.prompt_change})")
        else:
            tally.counts["right"] += 1
            served = found.prompt_token_ids + found.completion_token_ids
            if step.prompt_token_ids[: len(served)] == served:
                tally.counts["exact"] += 1
            else:
                why = step.prompt_change or ("tools" if step.tools != found.tools else "template")
                tally.why_not_exact[str(why)] += 1

    def _is_as_meant(self, found: Step, meant: Step) -> bool:
        """They are one step, or what was said is the very same to the last word, within one key and user."""
        is_same = found.conversation_digest == meant.conversation_digest or found.thread_digest == meant.thread_digest
        return found.id == meant.id or (is_same and self._whose(found) == self._whose(meant))

    def _whose(self, step: Step) -> tuple[str, str]:
        episode = self._log.episode(step.episode_id)
        assert episode is not None
        return episode.owner, episode.user


def _round(kinds: Iterable[str]):
    listed = list(kinds)
    while True:
        yield from listed


async def run(folder: Path, protocol: ChatProtocol, num_conversations: int, kinds: Iterable[str], seed: int) -> Traffic:
    """Hold so many conversations with a server whose engine says what it is told to."""
    engine = SayingEngine(protocol, limits=LIMITS)
    parts = parts_of(engine, protocol, folder, toolbox=Toolbox(), learning=None)
    transport = httpx.ASGITransport(create_app(parts))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client:
        traffic = Traffic(parts.log, engine, client, seed)
        await traffic.run(num_conversations, kinds)
    assert parts.log.verify() == []
    parts.log.close()
    parts.registry.close()
    return traffic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    protocol = ChatProtocol.load(NOVICE_FOLDER)
    with tempfile.TemporaryDirectory() as folder:
        traffic = asyncio.run(run(Path(folder), protocol, options.conversations, REWRITES, options.seed))
    print("| client | requests | begun | right | missed | wrong | token-exact | why not |")
    print("|---|---|---|---|---|---|---|---|")
    total = Counter[str]()
    for kind, tally in sorted(traffic.tallies.items()):
        total += tally.counts
        print(_row(kind, tally.counts, ", ".join(f"{why} {n}" for why, n in tally.why_not_exact.most_common())))
    print(_row("all", total, ""))
    for line in [line for tally in traffic.tallies.values() for line in tally.wrong][:10]:
        print(line)


def _row(kind: str, counts: Counter[str], why: str) -> str:
    num = sum(counts[name] for name in ("begun", "right", "missed", "wrong"))
    columns = [kind, num, *(counts[name] for name in ("begun", "right", "missed", "wrong", "exact")), why]
    return "| " + " | ".join(map(str, columns)) + " |"


if __name__ == "__main__":
    main()
