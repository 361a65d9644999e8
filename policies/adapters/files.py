"""Judges an adapter's folder before any engine sees it: a broken adapter can poison an engine, or kill it.

Engines were seen to load, with success, weights full of NaN, matrices too narrow for the network and adapters of
another network; so nothing is left to them. Reads the files alone, with neither torch nor peft.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors import SafetensorError

from policies.adapters.base_network import BaseNetwork
from policies.adapters.probe import PROBE_FILE, Probe, read_probe
from policies.types import EngineLimits

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, PROBE_FILE)

UNSUPPORTED_SETTINGS = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
"""PEFT settings that make more of an adapter than one plain low-rank pair a module, all of one rank and scale."""

TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

FLOAT_TYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
"""How NumPy reads each type that a LoRA may be stored in."""

Shape = tuple[int, ...]


class AdapterRefused(Exception):
    """An adapter must not be served. The message says what is wrong, with which file or tensor."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What a sound adapter folder holds."""

    digest: str
    """SHA-256 of the weights file, in hex."""
    rank: int
    modules: frozenset[str]
    """Full names of the modules it changes: `model.layers.0.self_attn.q_proj`."""
    probe: Probe


@dataclass(frozen=True, slots=True)
class _Tensor:
    dtype: str
    shape: Shape
    values: bytearray


def validate_adapter(path: Path, limits: EngineLimits, base: BaseNetwork) -> AdapterFiles:
    """Judge a PEFT folder against what the engine takes and the base network has. Raises AdapterRefused."""
    rank = adapter_rank(path)
    config = _read_config(path)
    _require_plain_lora(config)
    if rank > limits.max_rank:
        raise AdapterRefused(f"{CONFIG_FILE}: rank {rank} is above the engine's limit of {limits.max_rank}")
    probe = _read_probe(path, limits)
    _require_same_base(probe, base)
    weights = _read_weights(path)
    tensors = _parse_weights(weights)
    modules = _require_pairs(tensors)
    _require_target_modules(config, modules)
    for module in sorted(modules):
        _require_shapes(module, tensors, rank, base.shapes)
    for name, tensor in tensors.items():
        _require_finite(name, tensor)
    return AdapterFiles(hashlib.sha256(weights).hexdigest(), rank, modules, probe)


def adapter_rank(path: Path) -> int:
    """The rank an adapter's configuration states. Raises AdapterRefused where it states none."""
    rank = _read_config(path).get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterRefused(f"{CONFIG_FILE}: r must be a whole number of at least 1, not {rank!r}")
    return rank


def weights_digest(path: Path) -> str:
    """SHA-256 of an adapter's weights file, in hex. Raises AdapterRefused where there is none."""
    return hashlib.sha256(_read_weights(path)).hexdigest()


# ------------------------------------------------------------------------------------------------- files


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise AdapterRefused(f"the adapter folder {path.name} does not exist")
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterRefused(f"the adapter folder has no {CONFIG_FILE}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterRefused(f"{CONFIG_FILE} cannot be read: {_problem(error)}") from error
    if not isinstance(config, dict):
        raise AdapterRefused(f"{CONFIG_FILE} is not a JSON object")
    return config


def _read_weights(path: Path) -> bytes:
    try:
        return (path / WEIGHTS_FILE).read_bytes()
    except FileNotFoundError as error:
        raise AdapterRefused(f"the adapter folder has no {WEIGHTS_FILE}") from error
    except OSError as error:
        raise AdapterRefused(f"{WEIGHTS_FILE} cannot be read: {_problem(error)}") from error


def _problem(error: Exception) -> str:
    """In words, without the path that the system adds: clients may be told."""
    return str(error.strerror if isinstance(error, OSError) else error)


def _parse_weights(weights: bytes) -> dict[str, _Tensor]:
    try:
        entries = safetensors.deserialize(weights)
    except SafetensorError as error:
        raise AdapterRefused(f"{WEIGHTS_FILE} is damaged or cut short: {error}") from error
    if not entries:
        raise AdapterRefused(f"{WEIGHTS_FILE} holds no tensor")
    return {name: _Tensor(entry["dtype"], tuple(entry["shape"]), entry["data"]) for name, entry in entries}


def _read_probe(path: Path, limits: EngineLimits) -> Probe:
    try:
        probe = read_probe(path)
    except FileNotFoundError as error:
        raise AdapterRefused(
            f"the adapter folder has no {PROBE_FILE}: without its trainer's log probabilities nobody can tell "
            "whether the served adapter is the trained one"
        ) from error
    except (OSError, ValueError) as error:
        raise AdapterRefused(_problem(error)) from error
    for prompt in probe.prompts:
        if len(prompt.prompt_token_ids) + len(prompt.continuation) > limits.max_context_tokens:
            raise AdapterRefused(
                f"{PROBE_FILE}: a prompt is longer than the engine's {limits.max_context_tokens} tokens"
            )
        if not all(0 <= token_id < limits.vocab_size for token_id in prompt.prompt_token_ids):
            raise AdapterRefused(f"{PROBE_FILE}: a prompt has a token id outside the vocabulary of {limits.vocab_size}")
    return probe


# ------------------------------------------------------------------------------------------- judgements


def _require_plain_lora(config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterRefused(f"{CONFIG_FILE}: peft_type is {config.get('peft_type')!r}, only LORA is served")
    if config.get("bias", "none") != "none":
        raise AdapterRefused(f"{CONFIG_FILE}: bias is {config['bias']!r}, only 'none' is served")
    for setting in UNSUPPORTED_SETTINGS:
        if config.get(setting):
            raise AdapterRefused(f"{CONFIG_FILE}: {setting} is set, only plain LoRA of one rank and scale is served")


def _require_same_base(probe: Probe, base: BaseNetwork) -> None:
    if probe.base_fingerprint != base.fingerprint:
        raise AdapterRefused(
            f"the adapter was trained on another base network: {PROBE_FILE} names {probe.base_fingerprint[:12]}, "
            f"the served one is {base.fingerprint[:12]}"
        )


def _require_pairs(tensors: Mapping[str, _Tensor]) -> frozenset[str]:
    """The modules with a matrix A and a matrix B."""
    sides: dict[str, set[str]] = {}
    for name in tensors:
        match = TENSOR_NAME.fullmatch(name)
        if match is None:
            raise AdapterRefused(f"{WEIGHTS_FILE}: tensor {name} is no part of a plain LoRA")
        sides.setdefault(match["module"], set()).add(match["side"])
    for module, present in sides.items():
        if missing := {"A", "B"} - present:
            raise AdapterRefused(f"{WEIGHTS_FILE}: module {module} lacks its lora_{missing.pop()}")
    return frozenset(sides)


def _require_target_modules(config: dict[str, Any], modules: frozenset[str]) -> None:
    """What the configuration announces is what the weights hold, so that no engine leaves a part of it out."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise AdapterRefused(f"{CONFIG_FILE}: target_modules must be a list of module names, not {targets!r}")
    for target in targets:
        if not any(_is_named(module, target) for module in modules):
            raise AdapterRefused(f"{WEIGHTS_FILE} has no tensor for the target module {target!r}")
    for module in modules:
        if not any(_is_named(module, target) for target in targets):
            raise AdapterRefused(f"{WEIGHTS_FILE}: module {module} is not among {CONFIG_FILE}'s target_modules")


def _is_named(module: str, target: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _require_shapes(module: str, tensors: Mapping[str, _Tensor], rank: int, base_shapes: Mapping[str, Shape]) -> None:
    weight = base_shapes.get(f"{module}.weight")
    if weight is None or len(weight) != 2:
        raise AdapterRefused(f"{WEIGHTS_FILE}: the base network has no linear module {module}")
    num_outputs, num_inputs = weight
    for side, expected in (("A", (rank, num_inputs)), ("B", (num_outputs, rank))):
        name = f"base_model.model.{module}.lora_{side}.weight"
        if tensors[name].shape != expected:
            raise AdapterRefused(
                f"{WEIGHTS_FILE}: tensor {name} has shape {tensors[name].shape}, but rank {rank} on the base "
                f"network's {module} wants {expected}"
            )


def _require_finite(name: str, tensor: _Tensor) -> None:
    if tensor.dtype not in FLOAT_TYPES:
        raise AdapterRefused(f"{WEIGHTS_FILE}: tensor {name} is stored as {tensor.dtype}, which is no LoRA's type")
    values = np.frombuffer(tensor.values, FLOAT_TYPES[tensor.dtype])
    # NumPy has no bfloat16: there, infinite or no number means that all eight exponent bits are set.
    is_finite = (values & 0x7F80) != 0x7F80 if tensor.dtype == "BF16" else np.isfinite(values)
    if num_broken := int((~is_finite).sum()):
        raise AdapterRefused(f"{WEIGHTS_FILE}: tensor {name} has {num_broken} values that are not finite")
