"""Reads a base network from its folder, ready to infer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from runtime.engines.embedded.attention import ATTENTION


def load_network(model_path: str | Path, device: str) -> PreTrainedModel:
    """The network of a local folder, ready to infer: float32 on CPU, in its own type on a GPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else "auto"
    network = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, attn_implementation=ATTENTION)
    nn.Module.to(network, device)
    return network.eval().requires_grad_(False)
