"""The novice's tokenizer, with the templates that write and read its chats.

Bytes are its alphabet, so any text goes through unharmed. On top come whole tokens for what its chats are made of: the
chat template's fixed chunks, the tool calls' openings and the order desk's words. An episode is then about 110 tokens
long; with plain bytes it would be 1,500, more than so small a network can learn from in two minutes.
"""

from __future__ import annotations

from collections.abc import Iterable
from string import Formatter

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from policies.novice.curriculum import LOCKED_AWAY_TEXT, SOLD_OUT_TEXT
from tools.worlds import order_desk

END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"
TURN = "<|im_start|>"
CALL, CALL_END = "<tool_call>\n", "\n</tool_call>"
RESULT, RESULT_END = "<tool_response>\n", "\n</tool_response>"
CONTEXT_TOKENS = 2048

# Qwen's form with Hermes' tool turns. It differs from Qwen's own template in three points. Every tool result is a turn
# of its own (Qwen joins neighbours into one), so that a longer conversation always extends a shorter one's text.
# Nothing is stripped. And the tools' schemas are left out: this network knows its tools, and would read them in bytes.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
  {%- if content is string -%}{{ content }}
  {%- elif content -%}{%- for part in content -%}{{ part.text }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- if message.role == 'tool' -%}
    {{- '<tool_response>\\n' + text(message.content) + '\\n</tool_response>' -}}
  {%- else -%}
    {{- text(message.content) -}}
    {%- for call in message.tool_calls or [] -%}
      {%- set call = call.function if call.function else call -%}
      {%- if message.content or not loop.first -%}{{- '\\n' -}}{%- endif -%}
      {{- '<tool_call>\\n{"name": ' + call.name | tojson + ', "arguments": ' -}}
      {{- call.arguments if call.arguments is string else call.arguments | tojson -}}
      {{- '}\\n</tool_call>' -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# The inverse of an assistant's turn, to the character. A call ends at a raw newline and its tag: JSON text has no raw
# newline, so an argument that holds the tag does not end the call.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\n?<tool_call>\n",
            "close": CALL_END,
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        # The newline after a turn's end is the next turn's: as text of its own it would overwrite the content.
        "content": {
            "close_pattern": r"(?:<\|im_end\|>|<\|endoftext\|>)\s*",
            "content": "text",
            "content_args": {"strip": False},
        },
    },
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, always the same: 256 bytes, then the special tokens, then the words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    network = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    network.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    network.decoder = decoders.ByteLevel()
    network.add_special_tokens([AddedToken(token, normalized=False) for token in (PADDING, TURN, END_OF_TURN)])
    # Not "special": decoding must keep them even where special tokens are skipped.
    network.add_tokens([AddedToken(word, normalized=False, special=False) for word in _vocabulary()])
    return with_templates(network, CHAT_TEMPLATE, CONTEXT_TOKENS)


def with_templates(network: Tokenizer, chat_template: str, context_tokens: int) -> PreTrainedTokenizerFast:
    """A tokenizer as transformers loads it, with the templates that write and read its chats."""
    return PreTrainedTokenizerFast(
        tokenizer_object=network,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        model_max_length=context_tokens,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
        response_template=RESPONSE_TEMPLATE,
    )


def _vocabulary() -> list[str]:
    """Every token longer than one character, in a fixed order."""
    tokens = [*turn_chunks(), *_call_chunks(), *_text_chunks(), *_words()]
    return [token for token in dict.fromkeys(tokens) if len(token) > 1]


def turn_chunks() -> Iterable[str]:
    """What the chat template writes between two turns."""
    # The newline belongs to the turn that follows it: the token before it is the end of turn, where a completion stops.
    yield from (f"{TURN}system\n", f"{TURN}user\n", f"{TURN}assistant\n")
    yield from (f"\n{TURN}user\n", f"\n{TURN}assistant\n", f"\n{TURN}tool\n{RESULT}", RESULT_END)


def _call_chunks() -> Iterable[str]:
    """The opening of each tool's call up to its first argument's value, what joins two arguments, and the closing."""
    for name, arguments in order_desk.ARGUMENTS.items():
        first, *others = arguments.model_fields
        yield f'{CALL}{{"name": "{name}", "arguments": {{"{first}": "'
        yield from (f'", "{other}": "' for other in others)
    yield f'"}}}}{CALL_END}'


def _text_chunks() -> Iterable[str]:
    """What stands between the fields of the order desk's texts."""
    answers = (*order_desk.ANSWER_TEXTS.values(), SOLD_OUT_TEXT, LOCKED_AWAY_TEXT)
    texts = (*order_desk.ORDER_TEXTS, *order_desk.RESULT_TEXTS.values(), *answers)
    return (literal for text in texts for literal, *_ in Formatter().parse(text))


def _words() -> Iterable[str]:
    yield from (*order_desk.FIRST_NAMES, *order_desk.KINDS, *order_desk.CITIES, *order_desk.SHELVES)
    # Second words carry their space, so that "Ada Moreau" is two tokens and not three.
    yield from (f" {word}" for word in (*order_desk.LAST_NAMES, *order_desk.THINGS))
    yield from (*order_desk.PASSWORDS, *order_desk.STOCKS, *order_desk.REMARKS)
    yield from (*order_desk.BOX_FOR_CARE, *order_desk.WAY_FOR_WISH)
    yield from (*order_desk.BOX_FOR_CARE.values(), *order_desk.WAY_FOR_WISH.values())
