"""Multi-hop questions from files as they are published: HotpotQA, 2WikiMultihopQA and MuSiQue.

The search tool goes over all passages of the file. The published licences hold: HotpotQA CC BY-SA 4.0,
2WikiMultihopQA Apache 2.0, MuSiQue CC BY 4.0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BeforeValidator, Field, Strict, model_validator

from tools.worlds.listed import split_of_file
from tools.worlds.published import Published, Text, from_json_text, read_rows
from tools.worlds.questions import Question, QuestionWorld, normalized

Passage = tuple[str, str]
"""Title and text."""
Read = tuple[Question, list[Passage]]
Aliases = Mapping[str, tuple[str, ...]]
"""Other names of answers, by their keys in 2WikiMultihopQA."""
Second = TypeVar("Second")


class HotpotQA(QuestionWorld):
    """`hotpot_train_v1.1.json`, `hotpot_dev_distractor_v1.json` or `hotpot_dev_fullwiki_v1.json`, a row a line too."""

    def __init__(self, file: Path) -> None:
        _load(self, "hotpotqa", file, (row.read() for row in read_rows(file, _MarkedRow, _ContextRow)))


class TwoWikiMultihopQA(QuestionWorld):
    """`train.json` or `dev.json` of 2WikiMultihopQA. `id_aliases.json` beside it is read too."""

    def __init__(self, file: Path) -> None:
        aliases_file = (file if file.is_dir() else file.parent) / "id_aliases.json"
        listed = read_rows(aliases_file, _AliasRow) if aliases_file.exists() else ()
        aliases = {row.Q_id: (*row.aliases, *row.demonyms) for row in listed}
        rows = read_rows(file, _MarkedRow, _ContextRow)
        _load(self, "2wikimultihopqa", file, (row.read(aliases) for row in rows))


class MuSiQue(QuestionWorld):
    """`musique_ans_v1.0_dev.jsonl` and its like. Questions without an answer are left out."""

    def __init__(self, file: Path) -> None:
        rows = read_rows(file, _MarkedRow, _MuSiQueRow)
        _load(self, "musique", file, (row.read() for row in rows if row.answerable))


def _load(world: QuestionWorld, name: str, file: Path, found: Iterable[Read]) -> None:
    questions, passages = [], dict[Passage, None]()
    for question, around in found:
        questions.append(question)
        passages.update(dict.fromkeys(around))
    splits = split_of_file(file, questions, lambda question: " ".join(question.text.split()))
    QuestionWorld.__init__(world, name, dict(splits), passages)


# -------------------------------------------------------------------------------------------------- rows

Pair = Annotated[tuple[Text, Second], Strict(False)]
"""A list of two, which is what JSON has for a tuple."""


def _columns(first: str, *seconds: str) -> BeforeValidator:
    """Reads the forms of the Hugging Face hub as the published list of pairs: an object of two lists, a list of
    objects, or a text of JSON. The second may have one of several names."""

    def pair(found: dict[str, Any]) -> tuple[Any, Any] | None:
        return next(((found[first], found[name]) for name in seconds if first in found and name in found), None)

    def in_pairs(value: Any) -> Any:
        value = from_json_text(value)
        if isinstance(value, list):
            return [(pair(each) or each) if isinstance(each, dict) else each for each in value]
        columns = pair(value) if isinstance(value, dict) else None
        if columns is None or not all(isinstance(column, list) for column in columns) or len({*map(len, columns)}) != 1:
            return value
        return list(zip(*columns, strict=True))

    return BeforeValidator(in_pairs)


class _QuestionRow(Published):
    """What the questions of all three have."""

    question: Text
    answer: Text
    answer_aliases: list[Text] = Field(default_factory=list)
    answerable: bool = True
    """False for some of MuSiQue's."""

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, row: dict[str, Any]) -> dict[str, Any]:
        """FlashRAG has the answer and its aliases as `golden_answers`, and most of the published row as `metadata`."""
        match row:
            case {"golden_answers": [answer, *aliases], "metadata": dict(published)}:
                return published | {"answer": answer, "answer_aliases": aliases} | row
        if "question" in row and row.get("answer") is None:
            raise ValueError("`answer` is missing, as in a test set: nothing could be right")
        return row

    @model_validator(mode="after")
    def _has_an_answer(self) -> Self:
        if self.answerable and not self.answer.strip():
            raise ValueError("`answer` is empty, as in a test set: nothing could be right")
        return self

    @property
    def answers(self) -> tuple[str, ...]:
        return (self.answer, *self.answer_aliases)


class _ContextRow(_QuestionRow):
    """A question of HotpotQA or 2WikiMultihopQA: `context` has titles with sentences."""

    supporting_facts: Annotated[list[Pair[Any]], _columns("title", "sent_id")]
    context: Annotated[list[Pair[list[Text]]], _columns("title", "sentences", "content")]
    answer_id: Text | None = None
    """In 2WikiMultihopQA the key of its `id_aliases.json`."""

    def read(self, aliases: Aliases | None = None) -> Read:
        others = (aliases or {}).get(self.answer_id or "", ())
        passages = [(title, " ".join(sentence.strip() for sentence in sentences)) for title, sentences in self.context]
        titles = list(dict.fromkeys(title for title, _ in self.supporting_facts))
        return Question(self.question, (*self.answers, *others), tuple(_in_order(self.question, titles))), passages


class _AliasRow(Published):
    """Other names of an answer of 2WikiMultihopQA."""

    Q_id: Text
    aliases: list[Text] = Field(default_factory=list)
    demonyms: list[Text] = Field(default_factory=list)


class _Paragraph(Published):
    idx: int
    title: Text
    paragraph_text: Text


class _Hop(Published):
    paragraph_support_idx: int | None = None
    """None only where the question has no answer."""
    support_paragraph: _Paragraph | None = None
    """In FlashRAG's form, which has no other paragraphs."""

    @property
    def place(self) -> int | None:
        return self.support_paragraph.idx if self.support_paragraph else self.paragraph_support_idx


class _MuSiQueRow(_QuestionRow):
    """A question of MuSiQue: the steps of the decomposition tell in which paragraph each fact stands."""

    paragraphs: list[_Paragraph] = Field(default_factory=list)
    question_decomposition: list[_Hop]

    @model_validator(mode="after")
    def _has_the_paragraphs_of_its_facts(self) -> Self:
        places = {paragraph.idx for paragraph in self._all_paragraphs}
        if self.answerable and not {hop.place for hop in self.question_decomposition} <= places:
            raise ValueError("`question_decomposition` has a `paragraph_support_idx` that is no paragraph's `idx`")
        return self

    @property
    def _all_paragraphs(self) -> list[_Paragraph]:
        of_facts = (hop.support_paragraph for hop in self.question_decomposition)
        return [*self.paragraphs, *filter(None, of_facts)]

    def read(self) -> Read:
        titles: dict[int | None, str] = {paragraph.idx: paragraph.title for paragraph in self._all_paragraphs}
        facts = dict.fromkeys(titles[hop.place] for hop in self.question_decomposition)
        passages = [(paragraph.title, paragraph.paragraph_text) for paragraph in self._all_paragraphs]
        return Question(self.question, self.answers, tuple(facts)), passages


class _MarkedParagraph(Published):
    title: Text
    paragraph_text: Text
    is_supporting: bool


class _Answers(Published):
    spans: Annotated[list[Text], Field(min_length=1)]


class _MarkedRow(Published):
    """A question of any of the three in IRCoT's form: each paragraph says whether a fact stands in it."""

    told_by: ClassVar[str] = "question_text"
    answerable: ClassVar[bool] = True

    question_text: Text
    answers_objects: Annotated[list[_Answers], Field(min_length=1)]
    contexts: list[_MarkedParagraph]

    @model_validator(mode="after")
    def _has_an_answer(self) -> Self:
        if not self.answers_objects[0].spans[0].strip():
            raise ValueError("`answers_objects` has an empty answer, as in a test set: nothing could be right")
        return self

    def read(self, _: Aliases | None = None) -> Read:
        titles = list(dict.fromkeys(each.title for each in self.contexts if each.is_supporting))
        answers = tuple(span for answers in self.answers_objects for span in answers.spans)
        passages = [(each.title, each.paragraph_text) for each in self.contexts]
        return Question(self.question_text, answers, tuple(_in_order(self.question_text, titles))), passages


def _in_order(question: str, titles: list[str]) -> list[str]:
    """What the question names first; the rest an expert only finds there."""
    named = set(normalized(question))

    def share_named(title: str) -> float:
        words = normalized(title)
        return sum(word in named for word in words) / max(1, len(words))

    return sorted(titles, key=share_named, reverse=True)
