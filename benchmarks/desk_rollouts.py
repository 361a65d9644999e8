"""Episodes at the order desk without a server: many in lockstep on one KV cache, and a cycle's training data made of
them.

What a policy reads and writes is what it would through the endpoint: prompts are rendered and continued by
`ChatProtocol`, actions parsed by it, and compared by meaning.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from learner.data.comparison import compare
from learner.data.training_data import PolicyAction, State, Trajectory
from learner.practice import MAX_STEPS
from policies.chat.chat_protocol import ChatProtocol, action_message, message_action
from policies.types import Action, Completion, FinalAnswer, FinishReason, TokenIds, ToolCall, ToolCalls
from tools.worlds.order_desk import OrderDesk, OrderDeskEpisode
from tools.worlds.world import Message, Task

WORLD = OrderDesk()
MAX_ACTION_TOKENS = 48

# ---------------------------------------------------------------------------------------------- sampling


def load_policy(base: Path, adapter: Path | None) -> Any:
    """The base with the adapter merged into it: it samples faster, and the logprobs differ by rounding alone."""
    network: Any = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        network = PeftModel.from_pretrained(network, str(adapter)).merge_and_unload()
    return network.eval()


class Lockstep:
    """Conversations that one network reads and continues together. What a row does not read is a hole in its cache."""

    def __init__(self, network: Any, num_rows: int, stop_token_id: int, generator: torch.Generator) -> None:
        self._network = network
        self._stop = stop_token_id
        self._generator = generator
        self._cache = DynamicCache()
        self._mask = torch.zeros(num_rows, 0, dtype=torch.long)
        self._logits = torch.empty(0)

    @torch.inference_mode()
    def read(self, texts: Sequence[TokenIds]) -> None:
        """Append tokens to every row, of different lengths."""
        width = max(map(len, texts))
        self._forward(
            torch.tensor([(0,) * (width - len(text)) + text for text in texts]),
            torch.tensor([(0,) * (width - len(text)) + (1,) * len(text) for text in texts]),
        )

    @torch.inference_mode()
    def complete(self, temperatures: Tensor) -> list[Completion]:
        """Let every row write until its stop token, which it then has read."""
        num_rows = len(temperatures)
        written = [([], []) for _ in range(num_rows)]
        is_writing = torch.ones(num_rows, dtype=torch.bool)
        for _ in range(MAX_ACTION_TOKENS):
            tokens, logprobs = self._draw(temperatures)
            for row in is_writing.nonzero()[:, 0].tolist():
                written[row][0].append(int(tokens[row]))
                written[row][1].append(float(logprobs[row]))
            self._forward(tokens[:, None], is_writing.long()[:, None])
            is_writing &= tokens != self._stop
            if not is_writing.any():
                break
        reasons = [FinishReason.LENGTH if cut_off else FinishReason.STOP for cut_off in is_writing.tolist()]
        return [
            Completion(tuple(token_ids), tuple(logprobs), reason)
            for (token_ids, logprobs), reason in zip(written, reasons, strict=True)
        ]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        index = torch.tensor(rows)
        self._cache.batch_select_indices(index)
        self._mask = self._mask[index]

    def place(self) -> tuple[Tensor, Tensor]:
        """Where the conversations stand; see `go_back`."""
        return self._mask, self._logits

    def go_back(self, place: tuple[Tensor, Tensor]) -> None:
        """Forget what was read and written since."""
        num_since = self._mask.shape[1] - place[0].shape[1]
        self._mask, self._logits = place
        if num_since:
            self._cache.crop(-num_since)

    def _draw(self, temperatures: Tensor) -> tuple[Tensor, Tensor]:
        """A token for each row, and its logprob at temperature 1."""
        logprobs = self._logits.float().log_softmax(-1)
        scaled = (logprobs / temperatures.clamp(min=1e-6)[:, None]).softmax(-1)
        drawn = torch.multinomial(scaled, 1, generator=self._generator)[:, 0]
        tokens = torch.where(temperatures > 0, drawn, logprobs.argmax(-1))
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]

    def _forward(self, tokens: Tensor, mask: Tensor) -> None:
        width = tokens.shape[1]
        self._mask = torch.cat([self._mask, mask], dim=1)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        output = self._network(
            input_ids=tokens,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            logits_to_keep=1,
        )
        last = output.logits[:, -1]
        # A row that read nothing keeps what it would say next.
        is_read = mask[:, -1:].bool()
        self._logits = last if self._logits.shape != last.shape else torch.where(is_read, last, self._logits)


# ---------------------------------------------------------------------------------------------- episodes


@dataclass(slots=True)
class Attempt:
    """One order under way."""

    task: Task
    episode: OrderDeskEpisode
    messages: list[Message]
    prompt: TokenIds
    """What the policy reads before its next action."""
    states: list[State] = field(default_factory=list)
    is_over: bool = False
    is_malformed: bool = False

    @property
    def outcome(self) -> float:
        return self.episode.outcome()


@dataclass(frozen=True, slots=True)
class Desk:
    """The order desk as one chat protocol sees it."""

    protocol: ChatProtocol

    def attempts(
        self,
        network: Any,
        tasks: Sequence[Task],
        temperatures: Sequence[float],
        generator: torch.Generator,
        episode_ids: Sequence[str] | None = None,
    ) -> list[Attempt]:
        """Try every task once, all in lockstep.

        With `episode_ids` the states are kept, with the expert's answer at each, and the attempts go on to the last
        word; without, they end when the outcome is known.
        """
        all_attempts = [self._open(task) for task in tasks]
        lockstep = Lockstep(network, len(tasks), self.protocol.stop_token_ids[0], generator)
        lockstep.read([attempt.prompt for attempt in all_attempts])
        running, heat = list(range(len(tasks))), torch.tensor(temperatures)
        for number in range(MAX_STEPS):
            completions = lockstep.complete(heat[running])
            told = []
            for index, completion in zip(running, completions, strict=True):
                attempt = all_attempts[index]
                if episode_ids is not None:
                    attempt.states.append(self._state(attempt, (completion,), f"{episode_ids[index]}/{number}"))
                told.append(self._play(attempt, completion))
                if episode_ids is None:
                    attempt.is_over |= attempt.episode.is_done
            places = [place for place, index in enumerate(running) if not all_attempts[index].is_over]
            if not places or number + 1 == MAX_STEPS:
                break
            running = [running[place] for place in places]
            lockstep.keep(places)
            lockstep.read([told[place] for place in places])
        return all_attempts

    def own_trajectories(
        self, network: Any, tasks: Sequence[Task], generator: torch.Generator, name: str
    ) -> list[Trajectory]:
        """Own episodes at temperature 1, with the expert's answer at every state."""
        ids = [f"{name}/{number}" for number in range(len(tasks))]
        attempts = self.attempts(network, tasks, [1.0] * len(tasks), generator, ids)
        return [
            Trajectory(episode_id, tuple(attempt.states), attempt.task.id, attempt.outcome)
            for episode_id, attempt in zip(ids, attempts, strict=True)
        ]

    def demonstrations(self, tasks: Sequence[Task]) -> list[Trajectory]:
        """The expert's episodes at the tasks."""
        experts = [self._open(task) for task in tasks]
        for expert in experts:
            while not expert.is_over:
                self._play_expert(expert, ())
        return [_joined([expert]) for expert in experts]

    def inspected(
        self, network: Any, tasks: Sequence[Task], num_samples: int, generator: torch.Generator
    ) -> list[Trajectory]:
        """The expert's episodes at the tasks, with samples of the policy at each state."""
        experts = [self._open(task) for task in tasks for _ in range(num_samples)]
        lockstep = Lockstep(network, len(experts), self.protocol.stop_token_ids[0], generator)
        lockstep.read([expert.prompt for expert in experts])
        running = list(range(len(experts)))
        while running:
            before = lockstep.place()
            sampled = lockstep.complete(torch.ones(len(running)))
            lockstep.go_back(before)
            told = []
            for index, completion in zip(running, sampled, strict=True):
                told.append(self._play_expert(experts[index], (completion,)))
            places = [place for place, index in enumerate(running) if not experts[index].is_over]
            running = [running[place] for place in places]
            if running:
                lockstep.keep(places)
                lockstep.read([told[place] for place in places])
        groups = [experts[start : start + num_samples] for start in range(0, len(experts), num_samples)]
        return [_joined(group) for group in groups]

    # ------------------------------------------------------------------------------------------ one step

    def _open(self, task: Task) -> Attempt:
        return Attempt(task, WORLD.open(task), list(task.messages), self.protocol.render(task.messages))

    def _play(self, attempt: Attempt, completion: Completion) -> TokenIds:
        """Play the action; returns what the policy is told. An answer or a malformed action ends the attempt."""
        action = _parsed(self.protocol, completion)
        message = action_message(action)
        attempt.messages.append(message)
        if not isinstance(action, ToolCalls):
            attempt.is_over = True
            attempt.is_malformed = not isinstance(action, FinalAnswer)
            return ()
        results = attempt.episode.play(message)
        attempt.messages += results
        told = _told(self.protocol, tuple(result["content"] for result in results))
        attempt.prompt += completion.token_ids + told
        return told

    def _play_expert(self, attempt: Attempt, sampled: Sequence[Completion]) -> TokenIds:
        """Keep the state with the policy's samples, and go on as the expert does; returns what there is to read."""
        state = self._state(attempt, sampled, f"{attempt.task.id}/{len(attempt.states)}")
        attempt.states.append(state)
        assert state.expert is not None
        told = self._play(attempt, Completion(state.expert, (0.0,) * len(state.expert), FinishReason.STOP))
        return state.expert + told

    def _state(self, attempt: Attempt, own: Sequence[Completion], state_id: str) -> State:
        expert = _written(self.protocol, attempt.episode.expert_action())
        actions = tuple(self._own_action(attempt.episode, completion, state_id) for completion in own)
        return State(state_id, attempt.prompt, expert, actions)

    def _own_action(self, stood: OrderDeskEpisode, completion: Completion, step_id: str) -> PolicyAction:
        expert = message_action(stood.expert_action())
        agrees = compare(_parsed(self.protocol, completion), expert, stood.same_effect).agrees
        return PolicyAction(step_id, completion.token_ids, completion.logprobs, agrees)


def _joined(experts: Sequence[Attempt]) -> Trajectory:
    """One demonstration of the same one with different samples."""
    states = tuple(
        replace(same[0], policy_actions=tuple(action for state in same for action in state.policy_actions))
        for same in zip(*(expert.states for expert in experts), strict=True)
    )
    return Trajectory(f"expert/{experts[0].task.id}", states, experts[0].task.id, 1.0)


def _parsed(protocol: ChatProtocol, completion: Completion) -> Action:
    return _parsed_tokens(protocol, completion.token_ids, completion.finish_reason)


# Policies at the order desk say, and are told, the same few hundred things over and over; and this template writes a
# turn alike after any conversation. Rendering each conversation anew would take longer than its sampling.


@cache
def _parsed_tokens(protocol: ChatProtocol, token_ids: TokenIds, reason: FinishReason) -> Action:
    return protocol.parse(token_ids, reason)


@cache
def _told(protocol: ChatProtocol, results: tuple[str, ...]) -> TokenIds:
    """What the policy reads after its tool calls: their results, and the opening of its next turn."""
    action = ToolCalls((ToolCall("call", "check_item", {}),))
    _, said = protocol.completion_of(_ASKED, action)
    known = protocol.render(_ASKED) + said
    answers: list[Message] = [{"role": "tool", "tool_call_id": "call", "content": text} for text in results]
    return protocol.extend(known, [*_ASKED, action_message(action)], answers)[len(known) :]


def _written(protocol: ChatProtocol, message: Message) -> TokenIds:
    """An expert's message as the policy would have to write it."""
    action = message_action(message)
    match action:
        case ToolCalls((call,)):
            return _written_call(protocol, call.name, json.dumps(call.arguments))
        case _:
            return protocol.completion_of(_ASKED, action)[1]


@cache
def _written_call(protocol: ChatProtocol, name: str, arguments: str) -> TokenIds:
    return protocol.completion_of(_ASKED, ToolCalls((ToolCall("call", name, json.loads(arguments)),)))[1]


_ASKED: list[Message] = [{"role": "user", "content": "?"}]
