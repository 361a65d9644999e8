"""vLLM's arguments: ours, and over them the user's, by the names of vLLM's command line."""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from vllm.config import StructuredOutputsConfig
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from runtime.engines.vllm.adapters import TARGET_MODULES
from runtime.engines.vllm.on_cpu import cpu_args

OWN_ENGINE_ARGS = frozenset(
    "model tokenizer enable_lora max_loras max_cpu_loras max_lora_rank max_num_seqs logprobs_mode "
    "enable_sleep_mode structured_outputs_config disable_log_stats".split()
)
"""Set by this engine, because its promises depend on them; most have an option of their own."""

NUM_NULL_PLACES = 1
"""vLLM's CPU kernels take place -1, "no adapter", for the last place: where a batch is mixed, the base network's rows
would be computed with the adapter that lies there (vLLM pull request 48421). The last place is taken last: one place
more than adapters stays empty for ever."""


def own_engine_args(
    model: str,
    tokenizer: str | Path | None,
    max_batch_size: int,
    max_adapters: int,
    max_rank: int,
    max_context_tokens: int | None,
    kv_memory_bytes: int | None,
    num_threads: int | None,
) -> dict[str, Any]:
    """vLLM's arguments as this engine wants them. Sets the environment of vLLM's process."""
    if os.path.isdir(model):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if max_rank > max(get_args(MaxLoRARanks)):
        raise ValueError(f"vLLM takes adapters up to rank {max(get_args(MaxLoRARanks))}, not {max_rank}")
    num_places = max_adapters + NUM_NULL_PLACES if current_platform.is_cpu() else max_adapters
    args: dict[str, Any] = {
        "model": model,
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "tokenizer_mode": "hf",  # grammars cannot be made with Mistral's own, which vLLM prefers
        "max_num_seqs": max_batch_size,
        "max_model_len": max_context_tokens or -1,  # -1: as long as the memory allows
        "enable_lora": True,
        "kv_cache_memory_bytes": kv_memory_bytes,
        "max_loras": num_places,
        "max_cpu_loras": num_places,
        "max_lora_rank": min(rank for rank in get_args(MaxLoRARanks) if rank >= max_rank),
        "lora_target_modules": list(TARGET_MODULES),
        "structured_outputs_config": StructuredOutputsConfig(backend="guidance"),  # our grammars are llguidance's
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if current_platform.is_cpu():
        args |= cpu_args(model, max_context_tokens, kv_memory_bytes, num_threads)
    return args


def parse_engine_args(ours: Mapping[str, Any], users: Mapping[str, str]) -> AsyncEngineArgs:
    """Our arguments, overridden by the user's, which vLLM's own command line parser reads.

    Raises ValueError for an argument that vLLM does not have, or that is not the user's to set.
    """
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=False))
    parser.set_defaults(**ours)
    options = {action.dest: action for action in parser._actions}
    words: list[str] = []
    for name, value in users.items():
        option = options.get(name.replace("-", "_"))
        if option is None or option.dest in OWN_ENGINE_ARGS:
            raise ValueError(f"{name} is not an argument of vLLM" if option is None else f"{name} is set by the server")
        words += as_words(option.option_strings, option.nargs, value)
    try:
        return AsyncEngineArgs.from_cli_args(parser.parse_args(words))
    except (Exception, SystemExit) as error:
        raise ValueError(f"vLLM does not take {dict(users)}: {error}") from error


def as_words(spellings: Sequence[str], num_values: int | str | None, value: str) -> list[str]:
    """One argument as it stands on a command line."""
    if num_values == 0:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{spellings[0].lstrip('-')} is true or false, not {value!r}")
        wanted = value.lower() == "true"
        return [next(word for word in spellings if word.startswith("--no-") != wanted)]
    return [spellings[0], *value.split()] if num_values in ("+", "*") else [f"{spellings[0]}={value}"]
