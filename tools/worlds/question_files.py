"""Multi-hop questions from files as they are published: HotpotQA, 2WikiMultihopQA and MuSiQue.

The search tool goes over all passages of the file. The published licences hold: HotpotQA CC BY-SA 4.0,
2WikiMultihopQA Apache 2.0, MuSiQue CC BY 4.0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.worlds.listed import split_of_file
from tools.worlds.questions import Question, QuestionWorld, normalized

Passage = tuple[str, str]
"""Title and text."""
Read = tuple[Question, list[Passage]]


class HotpotQA(QuestionWorld):
    """`hotpot_train_v1.1.json`, `hotpot_dev_distractor_v1.json` or `hotpot_dev_fullwiki_v1.json`: a JSON list."""

    def __init__(self, file: Path) -> None:
        _load(self, "hotpotqa", file, _json_list(file), _with_context)


class TwoWikiMultihopQA(QuestionWorld):
    """`train.json` or `dev.json` of 2WikiMultihopQA: a JSON list. `id_aliases.json` beside it is read too."""

    def __init__(self, file: Path) -> None:
        aliases = _aliases(file.with_name("id_aliases.json"))

        def read(entry: dict[str, Any]) -> Read:
            question, passages = _with_context(entry)
            answers = (*question.answers, *aliases.get(entry.get("answer_id") or "", ()))
            return Question(question.text, answers, question.queries), passages

        _load(self, "2wikimultihopqa", file, _json_list(file), read)


class MuSiQue(QuestionWorld):
    """`musique_ans_v1.0_dev.jsonl` and its like: one JSON object a line. Questions without an answer are left out."""

    def __init__(self, file: Path) -> None:
        _load(self, "musique", file, list(_json_lines(file)), _with_paragraphs)


def _load(
    world: QuestionWorld, name: str, file: Path, entries: Sequence[Any], read: Callable[[dict[str, Any]], Read | None]
) -> None:
    questions, passages = [], dict[Passage, None]()
    for number, entry in enumerate(entries, start=1):
        try:
            if (found := read(entry)) is None:
                continue
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"{file}: entry {number} is none of {name}: {type(error).__name__} {error}") from error
        questions.append(found[0])
        passages.update(dict.fromkeys(found[1]))
    QuestionWorld.__init__(world, name, dict(split_of_file(file, questions)), passages)


def _with_context(entry: dict[str, Any]) -> Read:
    """HotpotQA's form, which 2WikiMultihopQA shares: `context` has titles with sentences."""
    passages = [(title, " ".join(sentence.strip() for sentence in sentences)) for title, sentences in entry["context"]]
    titles = list(dict.fromkeys(title for title, _ in entry["supporting_facts"]))
    return Question(entry["question"], (entry["answer"],), tuple(_in_order(entry["question"], titles))), passages


def _in_order(question: str, titles: list[str]) -> list[str]:
    """What the question names first; the rest an expert only finds there."""
    named = set(normalized(question))

    def share_named(title: str) -> float:
        words = normalized(title)
        return sum(word in named for word in words) / max(1, len(words))

    return sorted(titles, key=share_named, reverse=True)


def _with_paragraphs(entry: dict[str, Any]) -> Read | None:
    """MuSiQue's form: the steps of the decomposition tell in which paragraph each fact stands."""
    if not entry.get("answerable", True):
        return None
    paragraphs = {paragraph["idx"]: paragraph for paragraph in entry["paragraphs"]}
    passages = [(each["title"], each["paragraph_text"]) for each in paragraphs.values()]
    steps = [paragraphs[step["paragraph_support_idx"]]["title"] for step in entry["question_decomposition"]]
    answers = (entry["answer"], *entry.get("answer_aliases", ()))
    return Question(entry["question"], answers, tuple(dict.fromkeys(steps))), passages


# ------------------------------------------------------------------------------------------------- files


def read_text(file: Path) -> str:
    """A user's file. Raises ValueError in words where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _json_list(file: Path) -> list[Any]:
    try:
        entries = json.loads(read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{file} is not a JSON list of questions")
    return entries


def _json_lines(file: Path) -> Iterator[Any]:
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{file} line {number} is not JSON: {error}") from error


def _aliases(file: Path) -> dict[str, tuple[str, ...]]:
    if not file.exists():
        return {}
    return {each["Q_id"]: (*each.get("aliases", ()), *each.get("demonyms", ())) for each in _json_lines(file)}
