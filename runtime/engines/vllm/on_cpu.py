"""What vLLM's CPU build needs beside what a GPU's does: threads, memory, and the processor's tile registers.

AMX: vLLM's attention kernel for 16 bits uses the tile registers, and nobody asks the kernel for them in its process: it
dies with SIGILL at the first token. They are asked for where that process begins. Where they are refused, or several
processes compute (which begin in vLLM's own code), blocks of 16 tokens keep vLLM from that kernel.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoConfig

MAX_CONTEXT_ON_CPU = 4096
MIN_KV_CACHE_BYTES = 64 << 20
NUM_CONTEXTS_IN_KV_CACHE = 8
"""On a CPU, vLLM would reserve most of the memory; this many full contexts, shared by all completions, do."""

BLOCK_SIZE = 32
"""Tokens of a prefix that are reused together: the default of 128 finds few."""
BLOCK_SIZE_WITHOUT_AMX = 16
"""vLLM takes its AMX kernel where a block is a multiple of 32 tokens."""


def cpu_args(
    model: str, max_context_tokens: int | None, kv_memory_bytes: int | None, num_threads: int | None
) -> dict[str, Any]:
    # More threads than idle cores spin and wait for each other: half the cores, unless told.
    os.environ["OMP_NUM_THREADS"] = str(num_threads or os.environ.get("OMP_NUM_THREADS") or default_num_threads())
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the first logprobs would be compiled for half a minute
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process less, which would poll without rest
    config = AutoConfig.from_pretrained(model).get_text_config()
    per_token = kv_bytes(config)
    fits = config.max_position_embeddings if kv_memory_bytes is None else kv_memory_bytes // per_token
    context = max_context_tokens or min(config.max_position_embeddings, MAX_CONTEXT_ON_CPU, fits)
    wanted = max(MIN_KV_CACHE_BYTES, NUM_CONTEXTS_IN_KV_CACHE * context * per_token)
    return {
        "dtype": str(config.dtype or "auto").removeprefix("torch."),  # by itself, vLLM would halve 32 bits to 16
        "enforce_eager": True,
        "block_size": BLOCK_SIZE,
        "max_model_len": context,
        "kv_cache_memory_bytes": kv_memory_bytes or wanted,
    }


def default_num_threads() -> int:
    return max(1, len(os.sched_getaffinity(0)) // 2)


def kv_bytes(config: Any) -> int:
    """Bytes of keys and values that a token takes, in 16 or 32 bits as the network's weights."""
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * num_heads * head_dim * getattr(config.dtype, "itemsize", 4)


def safe_block_size(wanted: int, num_processes: int, has_amx: bool, may_use_amx: bool) -> int:
    """Tokens of a block with which vLLM's processes, `num_processes` of which compute, do not die of AMX."""
    is_asked_for = may_use_amx and num_processes == 1  # others begin in vLLM's own code
    return BLOCK_SIZE_WITHOUT_AMX if has_amx and not is_asked_for and wanted % 32 == 0 else wanted


def has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


def ask_for_amx() -> bool:
    """Get the tile registers for this process, and whether it may use them."""
    return has_amx() and torch.cpu._init_amx()
