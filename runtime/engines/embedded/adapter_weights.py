"""Reads a PEFT folder as LoRA weights, and refuses whatever this engine would not serve exactly as PEFT does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, load_peft_weights
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from policies.types import EngineError
from runtime.engines.embedded.lora import LoraWeights


def read_adapter(path: Path, network: PreTrainedModel, max_rank: int) -> dict[str, LoraWeights]:
    """Read a PEFT folder as LoRA weights per linear layer of the network. Raises EngineError for whatever this
    engine would not serve exactly as PEFT does.

    The files are read with PEFT's functions, but no PEFT model is built for it: that keeps the interpreter busy for a
    tenth of a second where the network is small, seconds where it has many layers, and every running completion would
    wait for it token by token.
    """
    try:
        config = plain_lora(PeftConfig.from_pretrained(str(path)))
        tensors = load_peft_weights(str(path), device="cpu")
        layers = target_layers(config, network)
        require_tensors(path, tensors, layers)
        weights = {name: lora_weights(name, layer, tensors, config, network) for name, layer in layers.items()}
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"adapter folder {path} cannot be read: {error}") from error
    if not (weights and 0 < config.r <= max_rank):
        raise EngineError(
            f"adapter folder {path} has rank {config.r} on {len(weights)} layers; this engine takes rank 1 to "
            f"{max_rank} on one layer or more"
        )
    return weights


def plain_lora(config: PeftConfig) -> LoraConfig:
    """The configuration, if it is of an adapter that is nothing but low-rank pairs. Raises EngineError else."""
    if not isinstance(config, LoraConfig):
        raise EngineError(f"only LoRA adapters are served, not {config.peft_type}")
    extras = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication")
    extras += ("fan_in_fan_out", "target_parameters", "rank_pattern", "alpha_pattern")
    used = [name for name in extras if getattr(config, name, None)]
    if config.bias != "none":
        used.append("bias")
    if used:
        raise EngineError(f"only plain LoRA adapters are served, this one uses {', '.join(used)}")
    return config


def target_layers(config: LoraConfig, network: PreTrainedModel) -> dict[str, nn.Linear]:
    """The layers that an adapter changes, by their path in the network."""
    layers = {name: module for name, module in network.named_modules() if check_target_module_exists(config, name)}
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise EngineError(f"only plain LoRA on linear layers is served, not on {name}, a {type(layer).__name__}")
    return layers  # type: ignore[return-value]


def require_tensors(path: Path, tensors: Mapping[str, torch.Tensor], layers: Iterable[str]) -> None:
    wanted = {tensor_name(layer, side) for layer in layers for side in "AB"}
    if tensors.keys() != wanted:
        missing, unexpected = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
        raise EngineError(f"adapter folder {path}: missing {missing[:3]}, unexpected {unexpected[:3]}")


def tensor_name(layer: str, side: str) -> str:
    return f"base_model.model.{layer}.lora_{side}.weight"


def lora_weights(
    name: str, layer: nn.Linear, tensors: Mapping[str, torch.Tensor], config: LoraConfig, network: PreTrainedModel
) -> LoraWeights:
    rank = config.r
    scaling = config.lora_alpha / (math.sqrt(rank) if config.use_rslora else rank)
    a, b = (tensors[tensor_name(name, side)].to(network.device, network.dtype) for side in "AB")
    for tensor, shape in ((a, (rank, layer.in_features)), (b, (layer.out_features, rank))):
        if tensor.shape != shape:
            raise ValueError(f"on {name} lies a matrix of {tuple(tensor.shape)}, where {shape} belongs")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise EngineError(f"the adapter's weights on {name} are not finite")
    return LoraWeights(a, (b * scaling).T.contiguous())
