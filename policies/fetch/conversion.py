"""From a GGUF file to a folder that every engine reads: safetensors, config, tokenizer and chat template.

The weights are stored in bfloat16, as their makers publish them: half of float32, and what they lose to it is small
beside what the four bits have cost already: for SmolLM2 5e-5 nats a token, and the same likeliest token 99.9 % of the
time. Who computes in float32 reads them as float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from policies.fetch.packages import FetchError

STORED_IN = "bfloat16"


def convert(gguf: Path, folder: Path, chat_template: str) -> None:
    """Write the model folder. Draws progress bars on stderr; takes about a minute."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise FetchError("converting needs the package gguf: pip install -c constraints.txt -e '.[fetch]'") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=STORED_IN, **_dense())
    # It is an ordinary network now, and has to be saved as one.
    network.is_quantized = False
    network.hf_quantizer = None
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    network.save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    splitting = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    split_as_in_training(tokenizer, splitting.contents() if splitting else "")
    tokenizer.model_max_length = network.config.max_position_embeddings
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


def _dense() -> dict[str, Any]:
    """Ask for ordinary weights. Older transformers know no others, and have no word for it."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def split_as_in_training(tokenizer: Any, splitting: str) -> None:
    """Give the tokenizer the splitting that the GGUF file names: transformers takes GPT-2's for all of them.

    SmolLM2 cuts every digit off, which shows where white space stands before one.
    """
    from tokenizers import pre_tokenizers

    if splitting == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
