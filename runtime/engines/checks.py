"""What every engine refuses before it begins: the promises of `Engine` in policies/types.py, in one wording."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from policies.types import Adapter, EngineError, EngineLimits, SamplingParams


def check_request(prompt_token_ids: Sequence[int], sampling: SamplingParams, limits: EngineLimits) -> None:
    """Raises EngineError for a prompt or sampling that the engine cannot serve."""
    if not prompt_token_ids:
        raise EngineError("the prompt is empty")
    if len(prompt_token_ids) >= limits.max_context_tokens:
        raise EngineError(
            f"the prompt has {len(prompt_token_ids)} tokens; the context of {limits.max_context_tokens} "
            "must also hold a completion"
        )
    for token_id in (*prompt_token_ids, *sampling.stop_token_ids):
        if not 0 <= token_id < limits.vocab_size:
            raise EngineError(f"token id {token_id} is outside the vocabulary of {limits.vocab_size}")
    if sampling.grammar is not None and not limits.supports_grammar:
        raise EngineError("this engine has no tokenizer, which a grammar needs")


def check_scored(prompt_token_ids: Sequence[int], completion_token_ids: Sequence[int], limits: EngineLimits) -> None:
    """Raises EngineError for a completion that the engine cannot score after this prompt."""
    if not completion_token_ids:
        raise EngineError("there is no token to score")
    check_request((*prompt_token_ids, *completion_token_ids), SamplingParams(max_tokens=1), limits)


def check_loaded(adapter: Adapter | None, loaded: Mapping[str, Adapter]) -> None:
    """Raises EngineError for an adapter that is not loaded; None is the base network."""
    if adapter is not None and loaded.get(adapter.name) != adapter:
        raise EngineError(f"adapter {adapter.name} is not loaded; loaded are {sorted(loaded)}")


def check_place(adapter: Adapter, taken: Collection[str], limits: EngineLimits) -> None:
    """Raises EngineError where an adapter has no place beside those whose names are `taken`."""
    if adapter.name in taken:
        raise EngineError(f"adapter {adapter.name} is loaded already")
    if len(taken) >= limits.max_adapters:
        raise EngineError(f"all {limits.max_adapters} places for adapters are taken: {sorted(taken)}")


def check_unused(adapter: Adapter, num_users: int) -> None:
    """Raises EngineError while completions run or wait on an adapter."""
    if num_users:
        raise EngineError(f"adapter {adapter.name} is in use by {num_users} completions")
