"""Marks that steer a model, told apart from the same letters in somebody's text.

A tokenizer makes a control token of `<|im_end|>` wherever it reads it: in a chat template's own writing, where it ends
a turn, and in a tool's result, where whoever wrote that result would end the turn. So what messages say is broken
before it goes through the template: one sign that no text uses is put into each mark, which is then none, and the
template sees nothing else change. What comes out is encoded as always, and the tokens of that sign are left out.
Rendering with placeholders for whole contents would be simpler, but templates trim, cut and compare what messages say.

The way back is the same: what the policy spelled in ordinary tokens is broken for the response parser, and mended in
what it read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from policies.types import TokenIds

_BREAK = "\ufdd0"
"""Unicode's first noncharacter: for use within programs. A text that has it all the same gets it doubled."""

_BREAKS = re.compile(f"{_BREAK}{_BREAK}?")

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
        self._anchor = next((token.content for token in added.values() if token.special and not token.rstrip), "")
        self._in_messages = _starts_of(marks.values())
        pure = [marks[token_id] for token_id in self.ids]
        self._in_answers = _starts_of(pure)
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
        # `encode` keeps the interpreter's lock as long as it runs, for a long text that is seconds; this does not.
        [encoding] = self._backend.encode_batch([text], add_special_tokens=False)
        if _BREAK not in text:
            return tuple(encoding.ids)
        breaks = {at.start() for at in _BREAKS.finditer(text) if len(at.group()) == 1}
        breaks |= {at.start() + 1 for at in _BREAKS.finditer(text) if len(at.group()) == 2}
        ids = []
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if end - start == 1 and start in breaks:
                continue
            if any(at in breaks for at in range(start, end)):  # one token for the break and a neighbour, or for none
                return self._encode_cut(text, sorted(breaks))
            ids.append(token_id)
        return tuple(ids)

    def _encode_cut(self, text: str, breaks: list[int]) -> TokenIds:
        """The same by pieces, behind an anchor each: without one, some tokenizers put a space before a first word."""
        ids: list[int] = []
        for start, end in pairwise([-1, *breaks, len(text)]):
            anchor = self._anchor if start >= 0 else ""
            piece = self._backend.encode(anchor + text[start + 1 : end], add_special_tokens=False).ids
            ids += piece[1:] if anchor else piece
        return tuple(ids)

    def encode_plain(self, text: str) -> TokenIds:
        """Token ids of a text without any mark among them, whatever it says."""
        return self.encode(self.broken_text(text))

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
