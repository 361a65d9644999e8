"""Episodes of any world without a server: many in lockstep on one KV cache, and a cycle's training data made of them.

What a policy reads and writes is what it would through the endpoint: prompts are rendered and continued by
`ChatProtocol`, actions parsed by it, and compared by meaning.

The chat template must write a turn alike after any conversation, as the novice's and the students' do: what is said is
rendered once, and not anew with every conversation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from learner.data.comparison import compare
from learner.data.training_data import PolicyAction, State, Trajectory
from policies.chat.chat_protocol import ChatProtocol, action_message, message_action
from policies.types import Action, Completion, FinalAnswer, FinishReason, TokenIds, ToolCall, ToolCalls
from tools.worlds.world import Message, Task, World, WorldEpisode, max_steps_of

MAX_ACTION_TOKENS = 96
MAX_ROWS = 512
"""Conversations that share a KV cache."""

# ---------------------------------------------------------------------------------------------- sampling


def load_policy(base: Path, adapter: Path | None, device: str = "cpu") -> Any:
    """The base with the adapter merged into it: it samples faster, and the logprobs differ by rounding alone."""
    network: Any = AutoModelForCausalLM.from_pretrained(base).to(device)
    if adapter is not None:
        network = PeftModel.from_pretrained(network, str(adapter)).merge_and_unload()
    return network.eval()


def generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """One that draws where the network is, seeded by the other's next number; the same on a CPU."""
    if device.type == "cpu":
        return generator
    seed = int(torch.randint(2**62, (1,), generator=generator))
    return torch.Generator(device).manual_seed(seed)


class Lockstep:
    """Conversations that one network reads and continues together. What a row does not read is a hole in its cache."""

    def __init__(
        self,
        network: Any,
        num_rows: int,
        stop_token_id: int,
        generator: torch.Generator,
        max_action_tokens: int = MAX_ACTION_TOKENS,
    ) -> None:
        self._network = network
        self._stop = stop_token_id
        self._device = network.device
        self._generator = generator_on(self._device, generator)
        self._max_action_tokens = max_action_tokens
        self._cache = DynamicCache()
        self._mask = torch.zeros(num_rows, 0, dtype=torch.long, device=self._device)
        self._logits = torch.empty(0)

    @torch.inference_mode()
    def read(self, texts: Sequence[TokenIds]) -> None:
        """Append tokens to every row, of different lengths."""
        self._close_holes()
        width = max(map(len, texts))
        self._forward(
            torch.tensor([(0,) * (width - len(text)) + text for text in texts], device=self._device),
            torch.tensor([(0,) * (width - len(text)) + (1,) * len(text) for text in texts], device=self._device),
        )

    @torch.inference_mode()
    def complete(self, temperatures: Tensor) -> list[Completion]:
        """Let every row write until its stop token, which it then has read."""
        num_rows, temperatures = len(temperatures), temperatures.to(self._device)
        written = [([], []) for _ in range(num_rows)]
        is_writing = torch.ones(num_rows, dtype=torch.bool, device=self._device)
        for _ in range(self._max_action_tokens):
            tokens, logprobs = self._draw(temperatures)
            drawn = zip(written, is_writing.tolist(), tokens.tolist(), logprobs.tolist(), strict=True)
            for (token_ids, said), goes_on, token_id, logprob in drawn:
                if goes_on:
                    token_ids.append(token_id)
                    said.append(logprob)
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
        index = torch.tensor(rows, device=self._device)
        self._cache.batch_select_indices(index)
        self._mask = self._mask[index]
        self._logits = self._logits[index]

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

    def _close_holes(self) -> None:
        """Move every row's tokens together, where a fifth of the cache would be holes: long episodes have many."""
        longest = int(self._mask.sum(1).max())
        if self._mask.shape[1] < 1.25 * longest:
            return
        order = self._mask.argsort(dim=1, stable=True)[:, -longest:]
        self._mask = self._mask.gather(1, order)
        layers: list[Any] = self._cache.layers
        for layer in layers:
            places = order[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys, layer.values = layer.keys.gather(2, places), layer.values.gather(2, places)


# ---------------------------------------------------------------------------------------------- episodes


@dataclass(slots=True)
class Attempt:
    """One task under way."""

    task: Task
    episode: WorldEpisode
    messages: list[Message]
    prompt: TokenIds
    """What the policy reads before its next action."""
    states: list[State] = field(default_factory=list)
    is_over: bool = False
    is_malformed: bool = False

    @property
    def outcome(self) -> float:
        return self.episode.outcome()


class Rollouts:
    """A world as one model reads and writes it."""

    def __init__(self, world: World, model: Path | ChatProtocol) -> None:
        """`model` is a model's folder, or its protocol where that is at hand."""
        self.world = world
        self.protocol = model if isinstance(model, ChatProtocol) else ChatProtocol.load(model)
        self.max_steps = max_steps_of(world)

    def attempts(
        self,
        network: Any,
        tasks: Sequence[Task],
        temperatures: Sequence[float],
        generator: torch.Generator,
        episode_ids: Sequence[str] | None = None,
    ) -> list[Attempt]:
        """Try every task once, many in lockstep.

        With `episode_ids` the states are kept, with the expert's answer at each, and the attempts go on to the last
        word; without, they end when the outcome is known. A conversation that fills the network's context ends there.
        """
        ids = episode_ids or [""] * len(tasks)
        attempts = []
        for first in range(0, len(tasks), MAX_ROWS):
            part = slice(first, first + MAX_ROWS)
            attempts += self._attempts(
                network, tasks[part], temperatures[part], generator, ids[part], episode_ids is not None
            )
        return attempts

    def _attempts(
        self,
        network: Any,
        tasks: Sequence[Task],
        temperatures: Sequence[float],
        generator: torch.Generator,
        episode_ids: Sequence[str],
        keeps_states: bool,
    ) -> list[Attempt]:
        all_attempts = [self._open(task) for task in tasks]
        lockstep = self._lockstep(network, len(tasks), generator)
        lockstep.read([attempt.prompt for attempt in all_attempts])
        running, heat = list(range(len(tasks))), torch.tensor(temperatures)
        for number in range(self.max_steps):
            completions = lockstep.complete(heat[running])
            told = []
            for index, completion in zip(running, completions, strict=True):
                attempt = all_attempts[index]
                if keeps_states:
                    attempt.states.append(self._state(attempt, (completion,), f"{episode_ids[index]}/{number}"))
                told.append(self._play(attempt, completion))
                attempt.is_over |= not keeps_states and attempt.episode.is_done
                attempt.is_over |= len(attempt.prompt) + MAX_ACTION_TOKENS > network.config.max_position_embeddings
            places = [place for place, index in enumerate(running) if not all_attempts[index].is_over]
            if not places or number + 1 == self.max_steps:
                break
            running = [running[place] for place in places]
            lockstep.keep(places)
            lockstep.read([told[place] for place in places])
        return all_attempts

    def own_trajectories(
        self, network: Any, tasks: Sequence[Task], generator: torch.Generator, name: str
    ) -> list[Trajectory]:
        """Own episodes at temperature 1, with the expert's answer at every state where it has one."""
        ids = [f"{name}/{number}" for number in range(len(tasks))]
        attempts = self.attempts(network, tasks, [1.0] * len(tasks), generator, ids)
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
        return Lockstep(network, num_rows, self.protocol.stop_token_ids[0], generator)

    def _open(self, task: Task) -> Attempt:
        return Attempt(task, self.world.open(task), list(task.messages), self.protocol.render(task.messages))

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
        message = attempt.episode.expert_action()
        expert = None if message is None else _written(self.protocol, message)
        actions = tuple(self._own_action(attempt.episode, message, completion, state_id) for completion in own)
        return State(state_id, attempt.prompt, expert, actions)

    def _own_action(
        self, stood: WorldEpisode, expert: Message | None, completion: Completion, step_id: str
    ) -> PolicyAction:
        agrees = None
        if expert is not None:
            action = _parsed(self.protocol, completion.token_ids, completion.finish_reason)
            agrees = compare(action, message_action(expert), stood.same_effect).agrees
        return PolicyAction(step_id, completion.token_ids, completion.logprobs, agrees)


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
