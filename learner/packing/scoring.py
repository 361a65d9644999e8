"""Scores the sequences of a pack in one forward pass of a causal language model of transformers.

A token sees its ancestors in the tree and stands at its depth, so its logprob is what a pass over its own sequence
alone would give. The decoder runs over the whole pack, the output layer only where there is a target to score. The
network must be loaded with `attn_implementation=TREE_ATTENTION`.

The reference is the same network with its adapter off or switched: see `reference`. A second copy of the base was
refused, it would double the memory for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from learner.packing.prefix_tree import Pack
from learner.packing.tree_attention import LONG_PACK, TREE_ATTENTION, Tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARCHITECTURES = frozenset({"gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"})
"""The `model_type`s whose packed scores are tested against sequence-by-sequence ones, sliding windows included."""
MAX_LOGITS = 2**26
"""Most logits to hold at once (256 MiB in float32); where there are more, backward makes them again."""


_NO_MASK = torch.empty(1, 1, 0, 0)
"""A mask of four dimensions: transformers then makes none of its own. The layers attend by the tree."""


# ----------------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """A pack on a device: n tokens, m scored tokens, u different (position, target) pairs among them."""

    input_ids: Tensor
    """int64 [1, n]"""
    position_ids: Tensor
    """int64 [1, n]: depths in the tree."""
    tree: Tree
    """Who sees whom."""
    pair_positions: Tensor
    """int64 [u]: the packed position that predicts."""
    pair_targets: Tensor
    """int64 [u]: the token it should predict."""
    pair_of_token: Tensor
    """int64 [m]: which pair scores a token; sequences that share a completion share its pairs."""
    sequence_of_token: Tensor
    """int64 [m]: index into `sequences`; the tokens of a sequence stand together, in order."""
    weights: Tensor
    """float32 [m]"""
    sequences: tuple[int, ...]
    """The packed sequences, by their index in what was given to `pack_sequences`, ascending."""


def to_batch(pack: Pack, device: torch.device | str) -> PackedBatch:
    """Bring a pack onto the device."""

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    scored, depths = pack.packed_sequences, tensor(pack.depths)
    pairs = np.stack(
        [_joined([sequence.positions for sequence in scored]), _joined([sequence.target_ids for sequence in scored])]
    )
    unique_pairs, pair_of_token = np.unique(pairs, axis=1, return_inverse=True)
    return PackedBatch(
        input_ids=tensor(pack.token_ids)[None],
        position_ids=depths[None],
        tree=Tree(tensor(pack.subtree_ends), depths, is_long=pack.num_tokens > LONG_PACK),
        pair_positions=tensor(unique_pairs[0]),
        pair_targets=tensor(unique_pairs[1]),
        pair_of_token=tensor(pair_of_token.reshape(-1)),
        sequence_of_token=tensor(np.repeat(np.arange(len(scored)), [len(sequence.positions) for sequence in scored])),
        weights=tensor(_joined([sequence.weights for sequence in scored]).astype(np.float32)),
        sequences=tuple(sequence.sequence for sequence in scored),
    )


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays)


# ----------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True, slots=True, eq=False)
class SequenceLogprobs:
    """Natural log probabilities of the scored tokens of a batch."""

    sequences: tuple[int, ...]
    """The sequences, by their index in what was given to `pack_sequences`, ascending."""
    tokens: Tensor
    """[m]: of each scored token given its sequence up to it. Float32 (float64 for a float64 network)."""
    sequence_of_token: Tensor
    """int64 [m]: index into `sequences`; the tokens of a sequence stand together, in order."""
    weights: Tensor
    """float32 [m]: each token's weight in its span."""

    def sums(self) -> Tensor:
        """[len(sequences)]: the logprob of each sequence's scored tokens together."""
        return self.tokens.new_zeros(len(self.sequences)).index_add(0, self.sequence_of_token, self.tokens)


def score(network: nn.Module, batch: PackedBatch) -> SequenceLogprobs:
    """One forward pass over the batch: the logprob of every scored token.

    `network` is a causal language model of transformers, or a PeftModel around one, as it stands: with the adapter that
    is active. Raises ValueError for an architecture whose packed scores are not known to be right.
    """
    hidden = hidden_states(network, batch)
    pairs = _pair_logprobs(_causal_lm(network), hidden[batch.pair_positions], batch.pair_targets)
    return SequenceLogprobs(batch.sequences, pairs[batch.pair_of_token], batch.sequence_of_token, batch.weights)


def hidden_states(network: nn.Module, batch: PackedBatch) -> Tensor:
    """[n, d]: of every packed token, what the output layer reads. Raises as `score` does."""
    causal_lm = _causal_lm(network)
    check_architecture(causal_lm)
    decoder: Any = causal_lm.get_decoder()
    return decoder(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=_NO_MASK,
        tree=batch.tree,
        use_cache=False,
    ).last_hidden_state[0]


@contextmanager
def reference(network: Any, adapter: str | None = None) -> Iterator[None]:
    """Within it, a PeftModel is the reference: another of its adapters, or (None) its base alone. Keeps no gradients.

    The active adapter is back afterwards.
    """
    with torch.no_grad():
        if adapter is None:
            with network.disable_adapter():
                yield
            return
        active = network.active_adapter
        network.set_adapter(adapter)
        try:
            yield
        finally:
            network.set_adapter(active)


def _causal_lm(network: Any) -> PreTrainedModel:
    """The transformers model itself: PEFT works inside its layers, so its adapters stay in effect."""
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def _pair_logprobs(causal_lm: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """hidden [u, d], targets [u] -> logprobs [u], in pieces of at most MAX_LOGITS logits."""
    piece = max(MAX_LOGITS // causal_lm.config.vocab_size, 1)
    if len(targets) <= piece:
        return _target_logprobs(causal_lm, hidden, targets)
    pieces: list[Any] = [
        checkpoint(_target_logprobs, causal_lm, *part, use_reentrant=False)
        for part in zip(hidden.split(piece), targets.split(piece), strict=True)
    ]
    return torch.cat(pieces)


def _target_logprobs(causal_lm: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    output_layer: Any = causal_lm.get_output_embeddings()
    logits = output_layer(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    cap = getattr(causal_lm.config, "final_logit_softcapping", None)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return -nn.functional.cross_entropy(logits, targets, reduction="none")


# ------------------------------------------------------------------------------------------------ architectures


def check_architecture(network: nn.Module) -> None:
    """Raises ValueError, with the reason, for a network whose packed scores are not known to be right."""
    config: Any = _causal_lm(network).config
    problem = _problem(config)
    if problem:
        raise ValueError(f"cannot score packed trees with {config.model_type}: {problem}")


def _problem(config: Any) -> str | None:
    """Why packed scores would differ from sequence-by-sequence ones. None: they are equal."""
    if config.model_type not in ARCHITECTURES:
        return f"only {', '.join(sorted(ARCHITECTURES))} are tested"
    if config._attn_implementation != TREE_ATTENTION:
        return f"load it with attn_implementation={TREE_ATTENTION!r}, not {config._attn_implementation!r}"
    rope_types = _rope_types(config) & {"dynamic", "longrope"}
    if rope_types:
        return f"rope type {rope_types.pop()!r} depends on the length of the sequence, which packing changes"
    if getattr(config, "use_bidirectional_attention", False):
        return "its tokens see later ones"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "the attention kernels leave out the softcap of its attention logits"
    return None


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary embedding in use: one, or one for each kind of layer."""
    parameters = config.rope_parameters or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {entry.get("rope_type", "default") for entry in nested or [parameters]}
