"""Questions that are answered by searching a collection of texts: what the worlds of multi-hop questions share.

An answer is scored as HotpotQA and SQuAD score theirs: exact match and F1 over normalised words, the best over all
accepted answers (Rajpurkar et al. 2016; Yang et al. 2018). The outcome is the exact match.
"""

from __future__ import annotations

import filecmp
import json
import re
import string
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import orjson
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from tools.search import search_tool
from tools.worlds.cache import cache_folder
from tools.worlds.calls import ToolEpisode, ToolSchema, answering, calling
from tools.worlds.listed import ListedWorld
from tools.worlds.world import Message

SYSTEM_PROMPT = (
    "Answer the question from what you find with the search tool; it may take several searches. "
    "Your answer is the bare fact, in as few words as it takes."
)

MOST_SEARCHES = 10_000
"""That are remembered: some kilobytes each."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and how an expert answers it."""

    text: str
    answers: tuple[str, ...]
    """All that are right; the first is the expert's."""
    queries: tuple[str, ...]
    """What the expert searches for, one after the other."""


# ------------------------------------------------------------------------------------------------- scores


def normalized(answer: str) -> list[str]:
    """The words that count: in lower case, without punctuation and articles."""
    text = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(answer: str, right: Iterable[str]) -> float:
    return float(any(normalized(answer) == normalized(each) for each in right))


def f1(answer: str, right: Iterable[str]) -> float:
    return max((_f1(normalized(answer), normalized(each)) for each in right), default=0.0)


def _f1(said: list[str], right: list[str]) -> float:
    if said != right and (said in (["yes"], ["no"]) or right in (["yes"], ["no"])):
        return 0.0  # HotpotQA: no credit for words around a wrong yes or no
    num_common = (Counter(said) & Counter(right)).total()
    return 2 * num_common / (len(said) + len(right)) if num_common else 0.0


# ------------------------------------------------------------------------------------------------ passages


def titles(found: str) -> list[str]:
    """Of the passages that a search found, the best first; none where it found none."""
    return [passage.partition(": ")[0] for passage in found.split("\n\n") if ": " in passage]


def _has_title(found: str, title: str) -> bool:
    return f"\n\n{title}: " in f"\n\n{found}"


def sought_title(query: str, found: Sequence[str]) -> str | None:
    """Of the titles that a query finds the longest that it names; the first where it names none."""
    words = set(normalized(query))
    named = [title for title in found if words.issuperset(normalized(title))]
    return max(named, key=len, default=next(iter(found), None))


# ------------------------------------------------------------------------------------------------ episode


class Search:
    """The search tool, which remembers what it found: an episode is opened again for each of its steps."""

    def __init__(self, tool: BaseTool) -> None:
        self.schema: ToolSchema = convert_to_openai_tool(tool)["function"]
        self.find: Callable[[str], str] = lru_cache(MOST_SEARCHES)(lambda arguments: tool.invoke(json.loads(arguments)))
        """What the tool says to arguments, given as JSON. Raises what the tool raises for arguments that do not fit."""


class QuestionEpisode(ToolEpisode):
    """One attempt at one question. The last answer counts."""

    def __init__(self, question: Question, search: Search) -> None:
        super().__init__()
        self.question = question
        self._search = search
        self._num_found = 0
        """Of the facts that the expert searches for, in its order."""
        self.said: str | None = None

    @property
    def is_done(self) -> bool:  # type: ignore[override]
        return self.said is not None

    def schemas(self) -> list[ToolSchema]:
        return [self._search.schema]

    def run(self, name: str, arguments: dict[str, Any]) -> str:
        del name
        sought = self.question.queries[self._num_found : self._num_found + 1]
        if arguments.get("query") in sought:  # also where that search finds nothing, or has no words to search for
            self._num_found += 1
            return self._search.find(json.dumps(arguments))
        found = self._search.find(json.dumps(arguments))
        self._num_found += any(self._has_passage(query, found) for query in sought)
        return found

    def _has_passage(self, query: str, found: str) -> bool:
        """Whether the passage that the expert's query is after is among those found."""
        try:
            by_expert = self._search.find(json.dumps({"query": query}))
        except ValueError:  # a title without a word in it
            return False
        if _has_title(by_expert, query):  # a title may have a colon, and be the beginning of others
            return _has_title(found, query)
        return sought_title(query, titles(by_expert)) in titles(found)

    def answer(self, text: str) -> None:
        self.said = text

    def outcome(self) -> float:
        return 0.0 if self.said is None else exact_match(self.said, self.question.answers)

    def f1(self) -> float:
        return 0.0 if self.said is None else f1(self.said, self.question.answers)

    def expert_action(self) -> Message:
        """The next search, then the answer. A fact is found once its passage was read, whatever was asked for."""
        if self._num_found < len(self.question.queries):
            return calling(
                self._search.schema["name"], {"query": self.question.queries[self._num_found]}, self.num_moves
            )
        return answering(self.question.answers[0])

    def reopened(self) -> QuestionEpisode:
        return QuestionEpisode(self.question, self._search)

    def is_where(self, other: QuestionEpisode) -> bool:
        reached, others = ((each.is_done, each.outcome(), each.f1()) for each in (self, other))
        return reached == others


# -------------------------------------------------------------------------------------------------- world


class QuestionWorld(ListedWorld[Question]):
    """Questions over a collection of passages (title and text)."""

    def __init__(
        self, name: str, questions: dict[str, Sequence[Question]], passages: Iterable[tuple[str, str]]
    ) -> None:
        self.name = name
        self._search = Search(search_tool(corpus_file(name, passages)))
        super().__init__(questions)

    def messages_of(self, item: Question) -> tuple[Message, ...]:
        return ({"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": item.text})

    def open_item(self, item: Question) -> QuestionEpisode:
        return QuestionEpisode(item, self._search)


def corpus_file(name: str, passages: Iterable[tuple[str, str]]) -> Path:
    """The passages as a file for the search tool; written again only where it is missing or was changed."""
    written = cache_folder() / f"{name}.{uuid4().hex}.part"
    checksum = 0
    try:
        with written.open("wb") as lines:
            for title, text in passages:
                line = orjson.dumps({"title": title, "text": text}) + b"\n"
                checksum = zlib.crc32(line, checksum)
                lines.write(line)
        path = cache_folder() / f"{name}-{checksum:08x}.jsonl"
        if not path.exists() or not filecmp.cmp(path, written, shallow=False):
            written.replace(path)
        return path
    finally:
        written.unlink(missing_ok=True)
