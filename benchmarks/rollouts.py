"""Episodes of any world without a server: many in lockstep on one KV cache, and a cycle's training data made of them.

What a policy reads and writes is what it would through the endpoint: prompts are rendered and continued by
`ChatProtocol`, actions parsed by it, and compared by meaning.

The chat template must write a turn alike after any conversation, as the novice's and the students' do: what is said is
rendered once, and not anew with every conversation.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.graphed_lockstep import GraphedLockstep
from benchmarks.lockstep import MAX_ACTION_TOKENS, Lockstep
from learner.data.comparison import compare
from learner.data.training_data import PolicyAction, State, Trajectory
from policies.chat.chat_protocol import ChatProtocol, action_message, message_action
from policies.types import (
    Action,
    Completion,
    FinalAnswer,
    FinishReason,
    MalformedAction,
    TokenIds,
    ToolCall,
    ToolCalls,
    ToolSchema,
)
from tools.worlds.simulators.episode import SimulatedEpisode
from tools.worlds.simulators.worker import MAX_LIVE
from tools.worlds.world import Message, Task, World, WorldEpisode, max_steps_of

MAX_ROWS = 512
"""Conversations that share a KV cache. Of a world in simulators as many as one of its processes holds: what is more
would be begun anew, and played up to its place, at every step."""

# ---------------------------------------------------------------------------------------------- episodes


@dataclass(slots=True)
class Attempt:
    """One task under way."""

    task: Task
    episode: WorldEpisode
    messages: list[Message]
    prompt: TokenIds
    """What the policy reads before its next action."""
    is_answered: bool
    """The expert says at each state what it would do."""
    states: list[State] = field(default_factory=list)
    is_over: bool = False
    is_malformed: bool = False
    seen: Counter[tuple[TokenIds, TokenIds]] = field(default_factory=Counter)
    """How often which action was told what."""

    @property
    def outcome(self) -> float:
        return self.episode.outcome()


class Rollouts:
    """A world as one model reads and writes it."""

    def __init__(self, world: World, model: Path | ChatProtocol, tools: Sequence[ToolSchema] = ()) -> None:
        """`model` is a model's folder, or its protocol where that is at hand. The prompt tells of `tools`: small
        students have learned theirs and read of none."""
        self.world, self._tools = world, tools
        self.protocol = model if isinstance(model, ChatProtocol) else ChatProtocol.load(model)
        self.max_steps = max_steps_of(world)
        self.max_action_tokens = MAX_ACTION_TOKENS
        self.max_repeats: int | None = None
        """An attempt at which the same action has been told the same so many times is over: it goes round in circles.
        None: it goes on."""

    def attempts(
        self,
        network: Any,
        tasks: Sequence[Task],
        temperatures: Sequence[float],
        generator: torch.Generator,
        episode_ids: Sequence[str] | None = None,
        answered: Collection[int] = (),
        max_steps: int | None = None,
    ) -> list[Attempt]:
        """Try every task once, many in lockstep, in at most so many steps; None: as many as the world lets it have.

        With `episode_ids` the states are kept, and the attempts go on to the last word; without, they end when the
        outcome is known. The expert is asked at the states of the tasks whose places are `answered`. A conversation
        that fills the network's context ends there.
        """
        ids = episode_ids or [""] * len(tasks)
        attempts = []
        is_simulated = bool(tasks) and isinstance(self.world.open(tasks[0]), SimulatedEpisode)
        num_rows = MAX_LIVE if is_simulated else MAX_ROWS
        for first in range(0, len(tasks), num_rows):
            part = slice(first, first + num_rows)
            opened = [self._open(task, place in answered) for place, task in enumerate(tasks[part], first)]
            attempts += opened
            self._attempt(network, opened, temperatures[part], generator, ids[part], max_steps, episode_ids is not None)
        return attempts

    def _attempt(
        self,
        network: Any,
        all_attempts: Sequence[Attempt],
        temperatures: Sequence[float],
        generator: torch.Generator,
        episode_ids: Sequence[str],
        max_steps: int | None,
        keeps_states: bool,
    ) -> None:
        max_steps = min(max_steps or self.max_steps, self.max_steps)
        lockstep = self._lockstep(network, len(all_attempts), generator)
        lockstep.read([attempt.prompt for attempt in all_attempts])
        running, heat = list(range(len(all_attempts))), torch.tensor(temperatures)
        for number in range(max_steps):
            completions = lockstep.complete(heat[running])
            told = []
            for index, completion in zip(running, completions, strict=True):
                attempt = all_attempts[index]
                if keeps_states:
                    attempt.states.append(self._state(attempt, (completion,), f"{episode_ids[index]}/{number}"))
                told.append(self._play(attempt, completion))
                attempt.seen[completion.token_ids, told[-1]] += 1
                attempt.is_over |= attempt.seen[completion.token_ids, told[-1]] == self.max_repeats
                attempt.is_over |= not keeps_states and attempt.episode.is_done
                attempt.is_over |= len(attempt.prompt) + MAX_ACTION_TOKENS > network.config.max_position_embeddings
            places = [place for place, index in enumerate(running) if not all_attempts[index].is_over]
            if not places or number + 1 == max_steps:
                break
            running = [running[place] for place in places]
            lockstep.keep(places)
            lockstep.read([told[place] for place in places])

    def own_trajectories(
        self,
        network: Any,
        tasks: Sequence[Task],
        generator: torch.Generator,
        name: str,
        answered: Collection[int],
        max_steps: int | None = None,
    ) -> list[Trajectory]:
        """Own episodes at temperature 1; of those whose places are `answered`, with the expert's answer at every state
        where it has one. To ask, and to hold what was done against the answer, can cost more than the episode."""
        ids = [f"{name}/{number}" for number in range(len(tasks))]
        attempts = self.attempts(network, tasks, [1.0] * len(tasks), generator, ids, answered, max_steps)
        return [
            Trajectory(episode_id, tuple(attempt.states), attempt.task.id, attempt.outcome)
            for episode_id, attempt in zip(ids, attempts, strict=True)
        ]

    def demonstrations(self, tasks: Sequence[Task]) -> list[Trajectory]:
        """The expert's episodes at the tasks; those that it does not bring to outcome 1 are left out."""
        experts = [self._open(task) for task in tasks]
        for expert in experts:
            while not expert.is_over:
                self._play_expert(expert, ())
        return _demonstrations(experts)

    def inspected(
        self, network: Any, tasks: Sequence[Task], num_samples: int, generator: torch.Generator
    ) -> list[Trajectory]:
        """The same episodes, with samples of the policy at each state."""
        experts = [self._open(task) for task in tasks]
        lockstep = self._lockstep(network, len(tasks) * num_samples, generator)
        lockstep.read([expert.prompt for expert in experts for _ in range(num_samples)])
        running = experts
        while running:
            before = lockstep.place()
            sampled = lockstep.complete(torch.ones(len(running) * num_samples))
            lockstep.go_back(before)
            told = [
                self._play_expert(expert, sampled[number * num_samples : (number + 1) * num_samples])
                for number, expert in enumerate(running)
            ]
            going_on = [number for number, expert in enumerate(running) if not expert.is_over]
            running = [running[number] for number in going_on]
            if running:
                lockstep.keep([number * num_samples + sample for number in going_on for sample in range(num_samples)])
                lockstep.read([told[number] for number in going_on for _ in range(num_samples)])
        return _demonstrations(experts)

    # ------------------------------------------------------------------------------------------ one step

    def _lockstep(self, network: Any, num_rows: int, generator: torch.Generator) -> Lockstep:
        kind = GraphedLockstep if network.device.type == "cuda" else Lockstep
        return kind(network, num_rows, self.protocol.stop_token_ids[0], generator, self.max_action_tokens)

    def _open(self, task: Task, is_answered: bool = True) -> Attempt:
        prompt = self.protocol.render(task.messages, self._tools)
        return Attempt(task, self.world.open(task), list(task.messages), prompt, is_answered)

    def _play(self, attempt: Attempt, completion: Completion) -> TokenIds:
        """Play the action; returns what the policy is told. A malformed action ends the attempt, and so does an answer
        to which the world's user says nothing."""
        action = _parsed(self.protocol, completion.token_ids, completion.finish_reason)
        message = action_message(action)
        attempt.messages.append(message)
        if not isinstance(action, ToolCalls | FinalAnswer):
            attempt.is_over = attempt.is_malformed = True
            return ()
        results = attempt.episode.play(message)
        attempt.messages += results
        if not results:
            attempt.is_over = True
            return ()
        told = _told(self.protocol, tuple((result["role"], result["content"]) for result in results))
        attempt.prompt += completion.token_ids + told
        return told

    def _play_expert(self, attempt: Attempt, sampled: Sequence[Completion]) -> TokenIds:
        """Keep the state with the policy's samples, and go on as the expert does; returns what there is to read."""
        state = self._state(attempt, sampled, f"{attempt.task.id}/{len(attempt.states)}")
        attempt.states.append(state)
        if state.expert is None or len(attempt.states) > self.max_steps:
            attempt.is_over = True
            return ()
        told = self._play(attempt, Completion(state.expert, (0.0,) * len(state.expert), FinishReason.STOP))
        return state.expert + told

    def _state(self, attempt: Attempt, own: Sequence[Completion], state_id: str) -> State:
        message = attempt.episode.expert_action() if attempt.is_answered else None
        expert = None if message is None else _written(self.protocol, message)
        actions = tuple(self._own_action(attempt.episode, message, completion, state_id) for completion in own)
        return State(state_id, attempt.prompt, expert, actions)

    def _own_action(
        self, stood: WorldEpisode, expert: Message | None, completion: Completion, step_id: str
    ) -> PolicyAction:
        action = _parsed(self.protocol, completion.token_ids, completion.finish_reason)
        agrees = None if expert is None else compare(action, message_action(expert), stood.same_effect).agrees
        return PolicyAction(
            step_id, completion.token_ids, completion.logprobs, agrees, is_malformed=isinstance(action, MalformedAction)
        )


def num_solved(attempts: Sequence[Attempt]) -> int:
    """In `agentdojo_attacks`, where an outcome tells that nothing planted was done: how many did what the user
    wanted."""
    from tools.worlds.agentdojo import AgentDojoEpisode

    episodes = [attempt.episode for attempt in attempts]
    return sum(isinstance(episode, AgentDojoEpisode) and episode.is_solved() for episode in episodes)


def _demonstrations(experts: Sequence[Attempt]) -> list[Trajectory]:
    return [
        Trajectory(f"expert/{expert.task.id}", tuple(expert.states), expert.task.id, 1.0)
        for expert in experts
        if expert.states[-1].expert is not None and expert.outcome == 1.0
    ]


# Policies say, and are told, the same things over and over. Rendering each conversation anew would take longer than its
# sampling.


@lru_cache(100_000)
def _parsed(protocol: ChatProtocol, token_ids: TokenIds, reason: FinishReason) -> Action:
    return protocol.parse(token_ids, reason)


@lru_cache(100_000)
def _told(protocol: ChatProtocol, said: tuple[tuple[str, str], ...]) -> TokenIds:
    """What the policy reads after its action, (role, text) each: its calls' results, or what the user says; and the
    opening of its next turn."""
    calls = tuple(ToolCall(f"call_{number}", "a_tool", {}) for number, (role, _) in enumerate(said) if role == "tool")
    action = ToolCalls(calls) if calls else FinalAnswer("An answer.")
    _, written = protocol.completion_of(_ASKED, action)
    known = protocol.render(_ASKED) + written
    new: list[Message] = [
        {"role": role, "content": text} | ({"tool_call_id": f"call_{number}"} if role == "tool" else {})
        for number, (role, text) in enumerate(said)
    ]
    return protocol.extend(known, [*_ASKED, action_message(action)], new)[len(known) :]


def _written(protocol: ChatProtocol, message: Message) -> TokenIds:
    """An expert's message as the policy would have to write it."""
    action = message_action(message)
    match action:
        case ToolCalls((call,)):
            return _written_call(protocol, call.name, json.dumps(call.arguments))
        case _:
            return protocol.completion_of(_ASKED, action)[1]


@lru_cache(100_000)
def _written_call(protocol: ChatProtocol, name: str, arguments: str) -> TokenIds:
    return protocol.completion_of(_ASKED, ToolCalls((ToolCall("call", name, json.loads(arguments)),)))[1]


_ASKED: list[Message] = [{"role": "user", "content": "?"}]
