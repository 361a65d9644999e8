"""Which modules an adapter may change: vLLM would leave out the others without a word."""

from __future__ import annotations

import safetensors

from policies.adapters.files import TENSOR_NAME, WEIGHTS_FILE
from policies.types import Adapter, EngineError

TARGET_MODULES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""vLLM's names of the linear modules that adapters may change. The output head is left out: wrapped, it is slower."""

PACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
PACKED["up_proj"] = "gate_up_proj"
"""Modules of a checkpoint that vLLM computes as a part of a larger one."""


def require_target_modules(adapter: Adapter, target_modules: frozenset[str]) -> None:
    """Refuse what vLLM would leave out without a word. Raises EngineError."""
    try:
        with safetensors.safe_open(adapter.path / WEIGHTS_FILE, framework="np") as weights:
            matches = [TENSOR_NAME.fullmatch(name) for name in weights.keys()]  # noqa: SIM118 (not a mapping)
    except (OSError, safetensors.SafetensorError) as error:
        raise EngineError(f"the weights of adapter {adapter.name} cannot be read: {error}") from error
    modules = {match["module"].rpartition(".")[2] for match in matches if match is not None}
    if unserved := sorted(name for name in modules if not {name, PACKED.get(name)} & target_modules):
        raise EngineError(f"adapter {adapter.name} changes {unserved}; vLLM serves only {sorted(target_modules)}")
