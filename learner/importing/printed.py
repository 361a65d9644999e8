"""Texts that are nobody's words: what a program printed of an API's object, or of a conversation in a chat template.

Logs and tables hold them where the words of a message should stand: the events of a stream, an answer that was cut off
within its JSON, Python's print of a message. They would be learned letter by letter; so the record is refused.
"""

from __future__ import annotations

import re

from learner.importing.fields import RefusedRecord

_ROLES = "assistant|user|system|developer|tool|human|ai|model"
_Q = "['\"]"
_MESSAGE = rf"""\{{\s*{_Q}role{_Q}\s*:\s*{_Q}(?:{_ROLES}){_Q}\s*,\s*{_Q}(?:content|tool_calls|parts|refusal){_Q}"""
_PRINTED = {
    "the events of a stream": rf"(?:event: ?[\w.]+\s+)?data: ?(?:\{{\s*{_Q}\w+{_Q}\s*:|\[DONE\])",
    "an API's answer": rf"\{{.{{0,400}}?{_Q}"
    rf"(?:object{_Q}\s*:\s*{_Q}(?:chat\.completion(?:\.chunk)?|text_completion|response){_Q}"
    rf"|choices{_Q}\s*:\s*\[\s*\{{[^{{}}]{{0,200}}{_Q}(?:message|delta|finish_reason){_Q})",
    "a request, or a list of messages": rf"\{{\s*{_Q}(?:messages|contents|input){_Q}\s*:\s*\[\s*"
    rf"(?:{_MESSAGE}|\{{\s*{_Q}role{_Q}\s*:\s*{_Q}\w*\Z)"
    rf"|\[\s*{_MESSAGE}",
    "a message": rf"{_MESSAGE}|\{{\s*{_Q}content{_Q}\s*:.{{0,100000}}{_Q}role{_Q}\s*:\s*{_Q}assistant{_Q}",
    "parts of a content": rf"\[\s*\{{\s*{_Q}type{_Q}\s*:\s*{_Q}(?:text|output_text|thinking|redacted_thinking"
    rf"|reasoning|tool_use|tool-call|tool_call|function_call){_Q}",
    "a Python object": r"\[?(?:(?:\w{0,40}Message(?:Chunk)?|Response)\((?:content|role|id|additional_kwargs)="
    r"|(?:ChatCompletion\w{0,40}|ModelResponse|GenerateContentResponse|LLMResult|ChatResult|ChatResponse|AgentFinish"
    r"|AgentRunResult)\(\w{1,40}=)|content=['\"\[].{0,100000}\b(?:additional_kwargs|response_metadata)=\{",
    "a program's error": r"Error code: \d{3} - \{|(?:litellm|openai|anthropic)\.\w+Error: ",
}
"""What was printed, in words, and how such a text begins."""
_PRINTS = {what: re.compile(pattern, re.DOTALL) for what, pattern in _PRINTED.items()}
_FOLDED_IN = re.compile(
    rf"^[ \t]*<details\b[^<>]*\btype={_Q}(?:reasoning|tool_calls|code_interpreter){_Q}", re.MULTILINE
)
"""A thought or a call as Open WebUI folds it in for the screen, anywhere in a text; what stands in a fence is shown."""
_FENCED = re.compile(r"^[ \t]*(`{3,}|~{3,}).*?(?:^[ \t]*\1|\Z)", re.MULTILINE | re.DOTALL)
_SAID_BY_NOBODY = ("a request, or a list of messages", "the events of a stream", "an API's answer")
"""Prints that no user shows, who may well ask about a program's error."""
_TURN_BEGINS = re.compile(
    r"(?:(?:<s>|<bos>|<\|begin_of_text\|>|<｜begin▁of▁sentence｜>)\s*)?(<\|im_start\|>|<\|start_header_id\|>|\[INST\]"
    r"|<start_of_turn>|<\|(?:user|system|assistant)\|>|<\|START_OF_TURN_TOKEN\|>|<｜User｜>)"
)
_TURN_ENDS = re.compile(
    r"(<\|im_end\|>|<\|eot_id\|>|<\|eom_id\|>|<\|end\|>|<\|return\|>|<\|endoftext\|>|<\|end_of_text\|>|<end_of_turn>"
    r"|<\|END_OF_TURN_TOKEN\|>|<｜end▁of▁sentence｜>|</s>)\Z"
)
_NOTHING = frozenset({"None", "null", "nan", "NaN", "undefined"})
"""How a table writes that a message has no words."""


def require_words(text: str) -> None:
    """Raises RefusedRecord for an assistant's text that is no words, or that a mark of a chat template ends."""
    require_not_printed(text)
    require_no_template(text)
    ends = _TURN_ENDS.search(text.rstrip()[-40:])
    if ends and not (ends[1] == "</s>" and re.search(r"<s[ >]", text, re.IGNORECASE)):
        raise RefusedRecord(f"its text ends with {ends[1]}, a mark of a model's chat template: take such marks out")


def require_not_printed(text: str, is_users: bool = False) -> None:
    """Raises RefusedRecord for the print of an object."""
    text = text.lstrip()
    what = next((what for what, pattern in _PRINTS.items() if pattern.match(text)), None)
    if what is None and _FOLDED_IN.search(_FENCED.sub("", text)):
        what = "a thought or a call, folded in for Open WebUI's screen"
    if what is not None and not (is_users and what not in _SAID_BY_NOBODY):
        raise RefusedRecord(f"its text is {what}, as a program printed it: write what was said, or leave it out")


def require_no_template(text: str) -> None:
    """Raises RefusedRecord for a text that begins as a model's chat template begins a message."""
    if found := _TURN_BEGINS.match(text.lstrip()):
        raise RefusedRecord(
            f"its text begins with {found[1]}, a mark of a model's chat template: write such texts as messages"
        )


def is_print_of_nothing(text: str) -> bool:
    """Whether a text beside calls is what a table writes where there is none."""
    return text.strip() in _NOTHING
