"""Where the policy stands when it is to act: the conversation so far, the tools on offer, how to sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from policies.chat.chat_protocol import ChatProtocol, action_message
from policies.types import Action, Adapter, Engine, Message, SamplingParams, Scorer, TokenIds, ToolSchema, adapter_name
from runtime.agent.conversation import messages_after
from runtime.privacy.redaction import Redactor
from runtime.store.episodes import Episode, PromptChange, ToolResult, new_id


@dataclass(frozen=True, slots=True)
class Policy:
    """Base network + adapter + chat protocol, ready to act."""

    engine: Engine
    protocol: ChatProtocol
    adapter: Adapter | None
    scorer: Scorer | None = None
    """Who chooses where several actions are drawn at a step; None: one is drawn."""

    @property
    def adapter_name(self) -> str:
        return adapter_name(self.adapter)

    def room_after(self, prompt: TokenIds) -> int:
        """How many tokens an answer may have after this prompt."""
        return self.engine.limits.max_context_tokens - len(prompt)


@dataclass(frozen=True, slots=True)
class Turn:
    """Everything that a step is made from."""

    episode: Episode
    parent_id: str | None
    """The step that this turn continues; None for a first step."""
    index: int
    """How many steps lie before."""
    served_token_ids: TokenIds
    """The history in tokens, as it was served; empty: it is rendered afresh."""
    history: tuple[Message, ...]
    """The conversation up to and including the parent's action."""
    new_messages: tuple[Message, ...]
    """What came since."""
    client_messages: tuple[Message, ...]
    """The whole conversation as the client sent it: without the calls and results of server-run tools."""
    tools: tuple[ToolSchema, ...]
    sampling: SamplingParams
    may_call: bool = True
    """False: the client wants no tool call; one that is written all the same cannot be taken as an action."""
    one_call: bool = False
    """The step ends with its first call: the client wants no others beside it."""
    shows_call_ids: bool = True
    """False: the client speaks OpenAI's older form, in which a call has no id."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    stream: bool = True
    """The client reads the answer while it is made."""
    tells_tokens: bool = False
    """The client wants each token's logprob: what each of them makes visible must be known."""
    prompt_change: PromptChange | None = None
    """What the client changed of the conversation that it continues; then `new_messages` is all of it."""
    redactor: Redactor | None = None
    """What is redacted in an answer when the client's next request brings it back."""
    step_id: str = field(default_factory=lambda: new_id("step"))
    """The id that the step will have; clients are told before it is taken."""

    @property
    def messages(self) -> tuple[Message, ...]:
        return self.history + self.new_messages

    def prompt(self, protocol: ChatProtocol) -> TokenIds:
        """The token ids the policy is given: the history's, as they were served, and the new messages'."""
        if not self.served_token_ids:
            return protocol.render(self.messages, self.tools)
        return protocol.extend(self.served_token_ids, self.history, self.new_messages, self.tools)

    def after(self, action: Action, served_token_ids: TokenIds, tool_results: Sequence[ToolResult]) -> Turn:
        """Where the policy stands after its tools ran, or after it was told that it could not be understood."""
        return replace(
            self,
            parent_id=self.step_id,
            index=self.index + 1,
            served_token_ids=served_token_ids,
            history=(*self.messages, action_message(action)),
            new_messages=messages_after(action, tool_results),
            prompt_change=None,
            step_id=new_id("step"),
        )
