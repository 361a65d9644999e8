"""Whether a pass with gradient fits the memory as it is, or each layer has to be computed again in the backward pass.

What a layer keeps for its gradient is most of a training's memory: for a network of 135 million weights 1.5 MB a token,
so 12 GB for a pass over 8,000. Computed again (activation checkpointing: Chen et al., arXiv 1604.06174) only its input
is kept, for about a third more time. So it is done where memory asks for it, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from policies.free_memory import free_bytes

SHARE_OF_FREE_MEMORY = 0.5
"""That a pass may take; what else lives on the machine grows too."""
BYTES = 4
"""Of a kept number. In half precision too: PEFT brings what its adapters read to float32."""


def activation_bytes(config: Any, num_tokens: int) -> int:
    """What a pass over so many tokens keeps for its gradient, about: 12 hidden and 5 intermediate widths in each layer
    (as they are in layers of Llama's kind with a LoRA on every projection)."""
    text: Any = config.get_text_config()
    return num_tokens * text.num_hidden_layers * (12 * text.hidden_size + 5 * text.intermediate_size) * BYTES


def fits(config: Any, num_tokens: int, device: torch.device) -> bool:
    """Whether a pass over so many tokens may keep all that its gradient needs."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_bytes()
    return activation_bytes(config, num_tokens) <= SHARE_OF_FREE_MEMORY * free


@contextmanager
def layers_computed_again(network: torch.nn.Module) -> Iterator[None]:
    """Forward passes within it keep the layers' inputs alone. The backward pass may come later.

    A layer of transformers does so only while it `is training`. That is said of the layer and not of what is in it: no
    dropout is switched on.
    """
    layers: list[Any] = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        layer.training = True
    try:
        yield
    finally:
        for layer, was_training in zip(layers, before, strict=True):
            layer.gradient_checkpointing, layer.training = False, was_training
