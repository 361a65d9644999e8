"""The contract between the floors: what a policy is given, what it chooses, and what an engine must do.

Imports nothing of the project. Records are frozen; what can be wrong is checked where they are made.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

TokenIds = tuple[int, ...]

Message = dict[str, Any]
"""One chat message in OpenAI's form: `role`, `content`, and where they apply `tool_calls`, `tool_call_id`."""

ToolSchema = dict[str, Any]
"""One tool in OpenAI's form: `{"type": "function", "function": {"name", "description", "parameters"}}`."""

BASE_ADAPTER = "base"
"""The adapter name of a step that was made by the base network with no adapter."""


# ---------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one completion is drawn. The defaults sample from the policy itself, unchanged."""

    max_tokens: int = 256
    """Most tokens to make, the stop token included."""
    temperature: float = 1.0
    """0 takes the likeliest token; 1 samples from the policy's own distribution."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this; 1 keeps all."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    seed: int | None = None
    """Same seed, prompt and adapter: same tokens, whatever else is in the batch. None: a fresh draw."""
    stop_token_ids: TokenIds = ()
    """Any of these ends the completion; it is the completion's last token."""
    num_top_logprobs: int = 0
    """How many of the likeliest tokens to report beside each sampled one, at most 20."""
    grammar: str | None = None
    """An llguidance grammar in Lark form that the completion's text must follow. None: unconstrained."""
    min_p: float = 0.0
    """Leave out tokens less likely than this part of the likeliest one's probability; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of prompt and completion become less likely; 1 changes nothing."""
    frequency_penalty: float = 0.0
    """Is taken off a token's logit for each time the completion has it already."""
    presence_penalty: float = 0.0
    """Is taken off a token's logit once, where the completion has it already."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit)."""
    best_of: int = 1
    """So many completions are drawn, and a `Scorer` chooses one of them. Not the engine's: it draws each alone."""

    @property
    def is_policy(self) -> bool:
        """Tokens are drawn from the policy's own distribution: the logprobs of `SampledToken` are those of the draw.

        One that was chosen among several is no draw of the policy: how likely the choice was is not known.
        """
        if self.best_of > 1:
            return False
        is_whole = self.top_p == 1.0 and self.top_k == 0 and self.min_p == 0.0 and self.grammar is None
        return self.temperature == 1.0 and is_whole and not self.has_penalties and not self.logit_bias

    @property
    def has_penalties(self) -> bool:
        """What was said before changes the draw; the logprobs that are told stay the policy's own."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0.0 <= self.temperature <= 100.0:
            raise ValueError(f"temperature must lie in [0, 100], got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, got {self.top_k}")
        if not 0 <= self.num_top_logprobs <= 20:
            raise ValueError(f"num_top_logprobs must lie in [0, 20], got {self.num_top_logprobs}")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}")
        if self.best_of < 1:
            raise ValueError(f"best_of must be at least 1, got {self.best_of}")
        if not self.repetition_penalty > 0.0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"  # a stop token was sampled, or the grammar was complete
    LENGTH = "length"  # max_tokens or the context was used up


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One token of a completion, in the order it was sampled."""

    token_id: int
    logprob: float
    """Natural log probability under the policy at temperature 1, before top-p and top-k, after the grammar's mask."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token id, logprob) of the likeliest tokens, best first; empty unless asked for."""
    finish_reason: FinishReason | None = None
    """Set on the completion's last token, None before."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole completion: parallel token ids and logprobs, and why it ended."""

    token_ids: TokenIds
    logprobs: tuple[float, ...]
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} token ids but {len(self.logprobs)} logprobs")


# ----------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call the policy chose to make."""

    id: str
    """Unique in its episode; the tool's result refers to it."""
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolCalls:
    """The policy wants these tools to be run, in this order or at once."""

    calls: tuple[ToolCall, ...]
    text: str = ""
    """What the policy said beside the calls."""
    reasoning: str = ""
    """What it thought before, where its chat protocol marks thinking."""

    def __post_init__(self) -> None:
        if not self.calls:
            raise ValueError("ToolCalls needs at least one call; an answer without calls is a FinalAnswer")


@dataclass(frozen=True, slots=True)
class FinalAnswer:
    """The policy answers the user and hands the turn back."""

    text: str
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class MalformedAction:
    """The policy wrote something its chat protocol cannot read as an action. It is data, never an exception."""

    text: str
    """The completion as it was written."""
    problem: str
    """What is wrong with it, in words that the policy is told."""


Action = ToolCalls | FinalAnswer | MalformedAction


# ---------------------------------------------------------------------------------------------- adapters


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA on the base network. One version is one name, one engine id and one folder, for ever."""

    name: str
    """`agent-v0007`."""
    version: int
    """7; also the engine's integer id. Counts from 1: 0 would be the base."""
    path: Path
    """A plain PEFT folder."""
    rank: int
    parent: str | None
    """Name of the adapter it was trained from; None: from the base."""
    digest: str
    """SHA-256 of its weights file, in hex."""
    is_reward: bool = False
    """It is a reward model: it scores actions and never acts. Its name and version are no registered adapter's."""
    agent: str = ""
    """Name of the agent that it was made for, and that alone it serves; empty: the server's own."""


def adapter_name(adapter: Adapter | None) -> str:
    """The name under which steps are logged and clients ask: `base` for the base network without an adapter."""
    return adapter.name if adapter else BASE_ADAPTER


# ------------------------------------------------------------------------------------------------ engine


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What an engine can take; everything beyond is refused before the engine sees it."""

    max_context_tokens: int
    """Prompt and completion together."""
    max_adapters: int
    """Adapters loaded at the same time: acting, candidate and one draining want three."""
    max_rank: int
    vocab_size: int
    supports_grammar: bool
    logprob_tolerance: float
    """Nats by which its logprobs may differ from another engine's: precision (`policies/adapters/probe.py`)."""
    context_cut: str = ""
    """Why the context is shorter than the network could read, and what to do; empty where it is not."""

    @property
    def context(self) -> str:
        """The context in words, with what bounds it where that is not the model."""
        holds = f"the model's context holds {self.max_context_tokens}"
        return f"{holds} ({self.context_cut})" if self.context_cut else holds


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """What `/health` tells of the engine."""

    is_alive: bool
    num_running: int
    """Completions in the batch now."""
    num_waiting: int
    """Completions that wait for a place in the batch."""
    problem: str = ""
    """Why it is not alive; empty while it is."""
    is_starting: bool = False
    """It is not alive yet, or not again, and is on its way: the problem tells how far."""
    num_restarts: int = 0
    """How often a dead engine was replaced since the server started."""


class EngineError(Exception):
    """An engine could not do what was asked, and why. The engine itself goes on, unless its `health` says else."""


class GrammarFailed(EngineError):
    """The request's grammar is one that the engine cannot hold a completion to: the request has to change."""


class Engine(Protocol):
    """Tokens in, tokens and logprobs out. No text crosses this line."""

    @property
    def limits(self) -> EngineLimits: ...

    def generate(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, adapter: Adapter | None, *, stream: bool = True
    ) -> AsyncIterator[SampledToken]:
        """Stream one completion. Closing the iterator cancels it and frees its place in the batch.

        `stream` False says that nobody reads along: an engine may then keep all tokens after the first until the last.
        Raises EngineError for an empty or too long prompt, an id outside the vocabulary, or an adapter that is
        not loaded, before the first token; and if the engine dies, at any point.
        """
        ...

    async def score(
        self, prompt_token_ids: Sequence[int], completion_token_ids: Sequence[int], adapter: Adapter | None
    ) -> tuple[float, ...]:
        """The log probability of each token of a given completion, at temperature 1; nothing is sampled.

        Raises EngineError as `generate` does.
        """
        ...

    async def load_adapter(self, adapter: Adapter) -> None:
        """Make an adapter servable beside the others. Raises EngineError where it would evict one, or cannot load."""
        ...

    async def unload_adapter(self, adapter: Adapter) -> None:
        """Free an adapter's slot. Raises EngineError while completions still run on it, or where it is not loaded."""
        ...

    def loaded_adapters(self) -> tuple[Adapter, ...]: ...

    def health(self) -> EngineHealth: ...

    async def close(self) -> None:
        """End every running completion with EngineError and free the engine's resources. May be called twice."""
        ...


# --------------------------------------------------------------------------------------- choosing among draws


@dataclass(frozen=True, slots=True)
class Draw:
    """One of several completions that were drawn for a step."""

    token_ids: TokenIds
    logprobs: tuple[float, ...]
    """Of each token, as it was drawn."""
    action: Action
    is_cut: bool = False
    """It ended at a limit of tokens or time, and not by itself."""


class Scorer(Protocol):
    """Says which of several draws at one state is the best."""

    @property
    def name(self) -> str:
        """What is logged beside its scores."""
        ...

    async def scores(self, prompt_token_ids: TokenIds, draws: Sequence[Draw]) -> list[float]:
        """One for each draw, larger for a better one; finite. They compare at one state alone.

        Raises EngineError where it needs the engine and that fails.
        """
        ...
