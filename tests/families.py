"""A chat protocol for every known way of writing turns, without the networks: for tests on reading and writing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerFast

from policies.chat.chat_protocol import ChatProtocol
from policies.fetch.packaged_models import GEMMA3_270M, SMOLLM2_135M
from policies.novice.tokenizer import build_tokenizer
from tests.tiny_checkpoints import (
    CALL_MARKS,
    CHATML_MARKS,
    CHECKPOINTS,
    GEMMA_MARKS,
    QWEN_2,
    byte_level,
    sentence_pieces,
)

# Qwen3-Coder's calls: every argument is bare text in a tag of its own.
QWEN_3_CODER = QWEN_2.replace(
    """{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
      {{- '}\\n</tool_call>' }}""",
    """{{- '<tool_call>\\n<function=' + call.function.name + '>\\n' }}
      {%- for key, value in call.function.arguments.items() %}
        {{- '<parameter=' + key + '>\\n' + (value if value is string else value | tojson) + '\\n</parameter>\\n' }}
      {%- endfor %}
      {{- '</function>\\n</tool_call>' }}""",
)
assert "<function=" in QWEN_3_CODER


@dataclass(frozen=True)
class WrittenFamily:
    """What tests have to know of a family beside its protocol."""

    takes_tools: bool = True
    thinks: bool = False
    max_calls: int = 2
    has_text_beside_calls: bool = True
    writes_json_calls: bool = True
    has_call_tokens: bool = True
    """A call begins with a token of its own; else with letters that any text may have."""


FAMILIES = {
    **{
        name: WrittenFamily(c.takes_tools, c.thinks, c.max_calls, c.has_text_beside_calls, True, name != "llama")
        for name, c in CHECKPOINTS.items()
    },
    "qwen3-coder": WrittenFamily(writes_json_calls=False),
    "smollm2": WrittenFamily(has_call_tokens=False),
    "gemma3-270m": WrittenFamily(has_call_tokens=False),
    "novice": WrittenFamily(has_call_tokens=False),
}
WITH_TOOLS = [name for name, family in FAMILIES.items() if family.takes_tools]
WITH_JSON_CALLS = [name for name in WITH_TOOLS if FAMILIES[name].writes_json_calls]
WITH_CALL_TOKENS = [name for name in WITH_TOOLS if FAMILIES[name].has_call_tokens]


@cache
def protocol_of(name: str) -> ChatProtocol:
    return ChatProtocol(tokenizer_of(name))


def tokenizer_of(name: str) -> Any:
    if name == "novice":
        return build_tokenizer()
    if name == "qwen3-coder":
        return _tokenizer(byte_level(CHATML_MARKS, CALL_MARKS), QWEN_3_CODER, eos="<|im_end|>", pad="<|endoftext|>")
    if name == "smollm2":
        return _tokenizer(byte_level(CHATML_MARKS), SMOLLM2_135M.chat_template, eos="<|im_end|>", pad="<|endoftext|>")
    if name == "gemma3-270m":
        pieces = sentence_pieces(GEMMA_MARKS, "<bos>", has_prefix_space=False)
        return _tokenizer(pieces, GEMMA3_270M.chat_template, eos="<eos>", pad="<pad>", bos="<bos>")
    checkpoint = CHECKPOINTS[name]
    return _tokenizer(
        checkpoint.tokenizer(), checkpoint.chat_template, eos=checkpoint.eos, pad=checkpoint.pad, bos=checkpoint.bos
    )


def _tokenizer(backend: Any, chat_template: str, eos: str, pad: str, bos: str | None = None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, pad_token=pad, bos_token=bos, chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
