"""Marks that steer a model, told apart from the same letters in somebody's text.

A tokenizer makes a control token of `<|im_end|>` wherever it reads it: in a chat template's own writing, where it ends
a turn, and in a tool's result, where whoever wrote that result would end the turn. So what messages say is broken
before it goes through the template: one sign that no text uses is put into each mark, which is then none, and the
template sees nothing else change. What comes out is encoded as always, but for the stretches that hold a broken mark:
those are mended and encoded by a copy of the tokenizer that knows no marks. Rendering with placeholders for whole
contents would be simpler, but templates trim, cut and compare what messages say.

The way back is the same: what the policy spelled in ordinary tokens is broken for the response parser, and mended in
what it read.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import pairwise
from typing import Any

from tokenizers import AddedToken, Tokenizer

from policies.types import TokenIds

_BREAK = "\ufdd0"
"""Unicode's first noncharacter: for use within programs. A text that has it all the same gets it doubled."""

_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


class ControlMarks:
    """The marks of one tokenizer and its chat template."""

    def __init__(self, tokenizer: Any, templates: str) -> None:
        """`templates` is the text of the chat template and the response template.

        Marks are all special tokens, and of the other added tokens those with a tag that the templates write:
        `<tool_call>` is one, Gemma's `<h1>` and the words of a small vocabulary are none.
        """
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if len(token.content) > 1}
        tags = {token_id: _TAG.findall(token.content) for token_id, token in added.items()}
        in_templates = {tag: tag in templates for found in tags.values() for tag in found}
        marks = {
            token_id: token.content
            for token_id, token in added.items()
            if token.special or any(in_templates[tag] for tag in tags[token_id])
        }
        self.ids = frozenset(
            token_id for token_id, mark in marks.items() if added[token_id].special or _TAG.fullmatch(mark.strip())
        )
        """Tokens that are marks and nothing else."""
        self._added_ids = frozenset(tokenizer.added_tokens_decoder)
        self._forbidden_ids = frozenset(marks)
        self._in_messages = _starts_of(marks.values())
        pure = [marks[token_id] for token_id in self.ids]
        self._in_answers = _starts_of(pure)
        self._pure = frozenset(pure)
        self._beginnings = frozenset(mark[:end] for mark in pure for end in range(1, len(mark)))
        self._longest = max(map(len, pure), default=0)

    # --------------------------------------------------------------------------------------- messages to tokens

    def broken(self, value: Any) -> Any:
        """A message, or a tool, whose texts hold no marks any more. Keys of objects are texts too."""
        return _with_texts(value, self.broken_text)

    def broken_text(self, text: str) -> str:
        return self._in_messages.sub(lambda mark: mark.group() + _BREAK, text.replace(_BREAK, _BREAK * 2))

    def encode(self, text: str) -> TokenIds:
        """Token ids of what a chat template wrote of broken messages: only its own marks become control tokens."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        if _BREAK not in text:
            return tuple(encoding.ids)
        ids: list[int] = []
        stretch: list[int] = []
        began = 0
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id not in self._added_ids:
                stretch.append(token_id)
                continue
            ids += self._stretch(text[began:start], stretch, is_first=began == 0)
            ids.append(token_id)
            stretch, began = [], end
        return (*ids, *self._stretch(text[began:], stretch, is_first=began == 0))

    def _stretch(self, text: str, as_encoded: list[int], is_first: bool) -> Iterable[int]:
        """Token ids of the text between two added tokens."""
        return self.encode_plain(mended(text), is_first) if _BREAK in text else as_encoded

    def encode_plain(self, text: str, is_first: bool = False) -> TokenIds:
        """Token ids of a text without any mark among them, whatever it says. `is_first`: nothing stands before it."""
        if not text:
            return ()
        # Behind the anchor, which is a token of its own, no space is put before the first word.
        ids = self._plain.encode(text if is_first else self._anchor + text, add_special_tokens=False).ids
        ids = ids if is_first else ids[1:]
        if self._forbidden_ids.isdisjoint(ids):
            return tuple(ids)
        # The vocabulary holds the mark as a word too: its letters are encoded apart.
        cut = next((found.end() for found in self._in_messages.finditer(text)), len(text) // 2) or 1
        assert len(text) > 1, f"{text!r} is a control token whatever it stands in"
        return self.encode_plain(text[:cut], is_first) + self.encode_plain(text[cut:])

    @cached_property
    def _anchor(self) -> str:
        return f"<{secrets.token_hex(16)}>"

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer without its added tokens."""
        definition = json.loads(self._backend.to_str())
        definition |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        plain = Tokenizer.from_str(json.dumps(definition))
        plain.add_special_tokens([AddedToken(self._anchor, normalized=False)])
        return plain

    # ------------------------------------------------------------------------------------------ tokens to text

    def split_off_beginning(self, text: str) -> tuple[str, str]:
        """An ordinary text broken, as far as it is certain, and its end that may be the beginning of a mark."""
        first = max(0, len(text) - self._longest)
        sure = next((at for at in range(first, len(text)) if text[at:] in self._beginnings), len(text))
        starts = [found.end() for found in self._in_answers.finditer(text) if found.end() <= sure]
        cuts = [0, *starts, sure]
        pieces = [text[a:b].replace(_BREAK, _BREAK * 2) for a, b in pairwise(cuts)]
        return _BREAK.join(pieces), text[sure:]


def mended(text: str) -> str:
    """A text as it was before it was broken."""
    return re.sub(f"{_BREAK}({_BREAK}?)", r"\1", text) if _BREAK in text else text


class Mender:
    """Mends a text that comes in pieces."""

    def __init__(self) -> None:
        self._held = ""

    def add(self, piece: str) -> str:
        whole = self._held + piece
        num_breaks = len(whole) - len(whole.rstrip(_BREAK))
        self._held = _BREAK * (num_breaks % 2)  # whether it stands for itself is told by what follows
        return mended(whole[: len(whole) - num_breaks % 2])


def mended_value(value: Any) -> Any:
    return _with_texts(value, mended)


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    match value:
        case str():
            return change(value)
        case list() | tuple():
            return [_with_texts(item, change) for item in value]
        case dict():
            return {_with_texts(key, change): _with_texts(item, change) for key, item in value.items()}
    return value


def _starts_of(marks: Iterable[str]) -> re.Pattern[str]:
    """A pattern for the first letter of every mark in a text, also of those that overlap.

    It branches letter by letter: a list of a thousand reserved tokens would be tried one by one at every bracket.
    """
    tree: dict[str, Any] = {}
    for mark in marks:
        branch = tree
        for letter in mark:
            branch = branch.setdefault(letter, {})
        branch[""] = {}
    starts = [re.escape(first) + f"(?={_pattern(rest)})" for first, rest in tree.items()]
    return re.compile("|".join(starts) or r"(?!)")


def _pattern(tree: dict[str, Any]) -> str:
    if "" in tree:  # a shorter mark is enough
        return ""
    branches = [re.escape(letter) + _pattern(rest) for letter, rest in tree.items()]
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
