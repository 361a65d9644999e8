"""Reads a base network from its folder, ready to infer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from runtime.engines.embedded.attention import ATTENTION
from runtime.engines.embedded.packed_linear import pack_linears
from runtime.engines.embedded.precision import Precision, choose_dtype


def load_network(model_path: str | Path, device: str, precision: Precision = "auto") -> PreTrainedModel:
    """The network of a local folder, on a torch device, or `auto`: a GPU if there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = choose_dtype(model_path, precision, device)
    network = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, attn_implementation=ATTENTION)
    nn.Module.to(network, device)
    network.eval().requires_grad_(False)
    pack_linears(network)
    return network
