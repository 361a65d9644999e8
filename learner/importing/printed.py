"""Texts that are nobody's words: what a program printed of an API's object, or of a conversation in a chat template.

Logs and tables hold them where the words of a message should stand: the events of a stream, an answer that was cut off
within its JSON, Python's print of a message. They would be learned letter by letter; so the record is refused.
"""

from __future__ import annotations

import re

from learner.importing.fields import RefusedRecord

_ROLES = "assistant|user|system|developer|tool|human|ai|model"
_PRINTED = {
    "the events of a stream": r"(?:event: ?[\w.]+\s+)?data: ?(?:\{|\[DONE\])",
    "an API's answer": r"""\{.{0,400}?['"](?:object['"]\s*:\s*['"](?:chat\.completion|text_completion|response)\b"""
    r"""|choices['"]\s*:\s*\[\s*\{\s*['"](?:index|finish_reason|message|delta|logprobs)['"])""",
    "a request, or a list of messages": r"""\{\s*['"](?:messages|contents|input)['"]\s*:\s*\[\s*\{"""
    rf"""|\[\s*\{{\s*['"]role['"]\s*:\s*['"](?:{_ROLES})['"]""",
    "a message": rf"""\{{\s*['"]role['"]\s*:\s*['"](?:{_ROLES})['"]\s*,\s*['"](?:content|tool_calls|parts|refusal)"""
    r"""|\{\s*['"]content['"]\s*:.*['"]role['"]\s*:\s*['"]assistant['"]""",
    "parts of a content": r"""\[\s*\{\s*['"]type['"]\s*:\s*['"](?:text|output_text|thinking|redacted_thinking"""
    r"""|reasoning|tool_use|tool-call|tool_call|function_call)['"]""",
    "a Python object": r"\[?(?:\w*Message(?:Chunk)?|ChatCompletion\w*|ModelResponse|Response|GenerateContentResponse"
    r"|LLMResult|ChatResult|ChatResponse|AgentFinish|AgentRunResult)\(\w+="
    r"|content=['\"\[].*\b(?:additional_kwargs|response_metadata)=\{",
    "a program's error": r"Error code: \d{3} - \{|(?:litellm|openai|anthropic)\.\w+Error: |Traceback \(most recent",
}
"""What was printed, in words, and how such a text begins."""
_PRINTS = {what: re.compile(rf"\s*(?:{pattern})", re.DOTALL) for what, pattern in _PRINTED.items()}
_TURN_BEGINS = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<｜begin▁of▁sentence｜>)?\s*(<\|im_start\|>|<\|start_header_id\|>|\[INST\]"
    r"|<start_of_turn>|<\|(?:user|system|assistant)\|>|<\|START_OF_TURN_TOKEN\|>|<｜User｜>)"
)
_TURN_ENDS = re.compile(
    r"(<\|im_end\|>|<\|eot_id\|>|<\|eom_id\|>|<\|end\|>|<\|return\|>|<\|endoftext\|>|<\|end_of_text\|>|<end_of_turn>"
    r"|<\|END_OF_TURN_TOKEN\|>|<｜end▁of▁sentence｜>|</s>)\s*$"
)
_NOTHING = frozenset({"None", "null", "nan", "NaN", "undefined"})
"""How a table writes that a message has no words."""


def require_words(text: str) -> None:
    """Raises RefusedRecord for an assistant's text that is no words, or that a mark of a chat template ends."""
    require_not_printed(text)
    require_no_template(text)
    if (found := _TURN_ENDS.search(text)) and not (found[1] == "</s>" and "<s>" in text):
        raise RefusedRecord(f"its text ends with {found[1]}, a mark of a model's chat template: take such marks out")


def require_not_printed(text: str) -> None:
    """Raises RefusedRecord for the print of an object."""
    what = next((what for what, pattern in _PRINTS.items() if pattern.match(text)), None)
    if what is not None:
        raise RefusedRecord(f"its text is {what}, as a program printed it: write what was said, or leave it out")


def require_no_template(text: str) -> None:
    """Raises RefusedRecord for a text that begins as a model's chat template begins a message."""
    if found := _TURN_BEGINS.match(text):
        raise RefusedRecord(
            f"its text begins with {found[1]}, a mark of a model's chat template: write such texts as messages"
        )


def is_print_of_nothing(text: str) -> bool:
    """Whether a text beside calls is what a table writes where there is none."""
    return text.strip() in _NOTHING
