"""Memory and time of one gradient through a long pack, on a CPU.

    python -m benchmarks.long_packs [--lengths 2048 8192 32768]

One trajectory of so many tokens, without branches, of which the last 50 are learned; a random Llama of 4 layers of 128
in float32, one thread. Once as a short pack is computed, every layer's activations kept, and once with each layer
computed again in the backward pass, which the trainer does where memory asks for it. Each in a process of its own: peak
resident memory above what was there before (Linux only), and CPU seconds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from contextlib import nullcontext
from random import Random
from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.figures import forget_most_memory, memory_mib
from learner.packing.prefix_tree import ScoredSequence, Span, pack_sequences
from learner.packing.scoring import score, to_batch
from learner.packing.tree_attention import TREE_ATTENTION
from learner.training.activation_memory import layers_computed_again
from learner.training.trainer import fresh_lora

VOCAB_SIZE, NUM_LEARNED = 1000, 50
WAYS = ("kept", "again")


def make_network(longest: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=longest,
    )  # fmt: skip
    config._attn_implementation = TREE_ATTENTION
    return get_peft_model(LlamaForCausalLM(config), fresh_lora(rank=16)).eval()


def measure(length: int, way: str) -> None:
    """Print MiB and CPU seconds of one gradient."""
    torch.set_num_threads(1)
    network, draw = make_network(length), Random(0)
    tokens = tuple(draw.randrange(VOCAB_SIZE) for _ in range(length))
    gradient(network, tokens[:256], way)  # lazy imports
    forget_most_memory()
    before, began = memory_mib(), time.process_time()
    gradient(network, tokens, way)
    seconds = time.process_time() - began
    print(f"{memory_mib('VmHWM') - before:.0f} MiB, {seconds:.1f} s")


def gradient(network: Any, tokens: tuple[int, ...], way: str) -> None:
    (pack,) = pack_sequences([ScoredSequence(tokens, (Span(len(tokens) - NUM_LEARNED, len(tokens)),), 0)], len(tokens))
    with layers_computed_again(network) if way == "again" else nullcontext():
        score(network, to_batch(pack, "cpu")).tokens.sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--one", nargs=2, metavar=("LENGTH", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(int(options.one[0]), options.one[1])
        return
    print(f"| tokens | {' | '.join(WAYS)} |\n|{'---|' * (1 + len(WAYS))}")
    for length in options.lengths:
        command = [sys.executable, "-m", "benchmarks.long_packs", "--one", str(length)]
        cells = [subprocess.run([*command, way], capture_output=True, text=True, check=True).stdout for way in WAYS]
        print(f"| {length:,} | {' | '.join(cell.strip() for cell in cells)} |", flush=True)


if __name__ == "__main__":
    main()
