"""Mind2Web from its published files (`train_0.json` and its like): recorded tasks on real web sites.

A recording goes on only the recorded way: the next page comes after the right action on the right element, and any
other action ends the episode. The outcome is 1 where every step was right, the paper's task success. Of a page the
right elements and some of the others are shown, in the order of the page; a task with a step whose element is not in
the published page is left out, because nobody could do it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tools.worlds.calls import ToolEpisode, ToolSchema, answering, calling, shown
from tools.worlds.listed import ListedWorld, split_of_file
from tools.worlds.published import Published, Text, from_json_text, read_rows
from tools.worlds.questions import normalized
from tools.worlds.world import Message

NUM_OTHERS = 40
"""Elements that are shown beside the right ones."""
LONGEST_ELEMENT = 200

_TOOLS = {
    "click": ("Click an element, or press enter on it.", ()),
    "type_text": ("Type a text into an element.", ("text",)),
    "select_option": ("Choose an option of an element.", ("value",)),
}
SCHEMAS: list[ToolSchema] = [
    {
        "name": name,
        "description": description,
        "parameters": {
            "type": "object",
            "properties": {key: {"type": "string"} for key in ("element", *more)},
            "required": ["element", *more],
        },
    }
    for name, (description, more) in _TOOLS.items()
]
_TOOL_OF_OPERATION = {"CLICK": "click", "TYPE": "type_text", "SELECT": "select_option"}


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """A page, and what was done on it."""

    page: str
    right_elements: tuple[str, ...]
    """Ids; the first is the expert's."""
    tool: str
    value: str

    def is_right(self, name: str, arguments: dict[str, Any]) -> bool:
        value = next((str(arguments[key]) for key in _TOOLS[self.tool][1] if key in arguments), "")
        is_same = name == self.tool and normalized(value) == normalized(self.value if _TOOLS[self.tool][1] else "")
        return is_same and str(arguments.get("element")) in self.right_elements

    def arguments(self) -> dict[str, str]:
        return {"element": self.right_elements[0]} | dict.fromkeys(_TOOLS[self.tool][1], self.value)


@dataclass(frozen=True, slots=True)
class Recording:
    """One recorded task."""

    text: str
    steps: tuple[RecordedStep, ...]

    def task(self) -> Hashable:
        """What makes it another task than another recording: not which other elements are shown."""
        right = tuple((step.tool, step.value, step.right_elements) for step in self.steps)
        return (" ".join(self.text.split()), right)


class Mind2WebEpisode(ToolEpisode):
    """One attempt at one recorded task."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording
        self._num_right = 0
        self._has_strayed = False

    @property
    def is_done(self) -> bool:  # type: ignore[override]
        return self._has_strayed or self._num_right == len(self._recording.steps)

    def schemas(self) -> list[ToolSchema]:
        return SCHEMAS

    def run(self, name: str, arguments: dict[str, Any]) -> str:
        if self.is_done:
            raise ValueError("the recording has come to its end")
        if not self._recording.steps[self._num_right].is_right(name, arguments):
            self._has_strayed = True
            return "The recording does not go on this way; it ends here."
        self._num_right += 1
        return "The task is done." if self.is_done else self._recording.steps[self._num_right].page

    def outcome(self) -> float:
        return float(self._num_right == len(self._recording.steps))

    def expert_action(self) -> Message | None:
        if self._has_strayed:
            return None
        if self.is_done:
            return answering("It is done.")
        step = self._recording.steps[self._num_right]
        return calling(step.tool, step.arguments(), self.num_moves)

    def reopened(self) -> Mind2WebEpisode:
        return Mind2WebEpisode(self._recording)

    def is_where(self, other: Mind2WebEpisode) -> bool:
        return (self._num_right, self._has_strayed) == (other._num_right, other._has_strayed)


class Mind2Web(ListedWorld[Recording]):
    """Every fifth task is held out, every fifth validates."""

    name = "mind2web"
    max_steps = 40

    def __init__(self, file: Path) -> None:
        super().__init__(split_of_file(file, _recordings(read_rows(file, _TaskRow)), Recording.task))

    def messages_of(self, item: Recording) -> tuple[Message, ...]:
        return ({"role": "user", "content": shown(f"{item.text}\n\n{item.steps[0].page}")},)

    def open_item(self, item: Recording) -> Mind2WebEpisode:
        return Mind2WebEpisode(item)


# --------------------------------------------------------------------------------------------------- files


class _Candidate(Published):
    """An element of a page."""

    tag: Text
    backend_node_id: Text
    is_original_target: bool = False
    attributes: Annotated[dict[Text, Any], BeforeValidator(from_json_text)]
    """A text of JSON; in the first version of the files an object."""


class _Operation(Published):
    op: Literal["CLICK", "TYPE", "SELECT"]
    value: Text = ""


class _ActionRow(Published):
    """A page, and what was done on it. In Multimodal-Mind2Web objects are texts of JSON."""

    action_uid: Text
    cleaned_html: Text
    operation: Annotated[_Operation, BeforeValidator(from_json_text)]
    pos_candidates: list[Annotated[_Candidate, BeforeValidator(from_json_text)]]
    neg_candidates: list[Annotated[_Candidate, BeforeValidator(from_json_text)]]


class _TaskRow(Published):
    """A recorded task; in Multimodal-Mind2Web one step of it."""

    website: Text
    confirmed_task: Text
    actions: list[_ActionRow]
    annotation_id: Text = ""
    action_reprs: list[Any] = Field(default_factory=list)
    """One for each step of the task."""
    target_action_index: Annotated[int | None, BeforeValidator(from_json_text)] = None
    """The place of a row that is one step."""

    @model_validator(mode="before")
    @classmethod
    def _with_its_step(cls, row: dict[str, Any]) -> dict[str, Any]:
        if "actions" in row or "action_uid" not in row:
            return row
        if row.get("target_action_index") is None:
            raise ValueError("`target_action_index` is missing")
        return row | {"actions": [row]}

    @property
    def text(self) -> str:
        return f"On the web site {self.website}: {self.confirmed_task}"

    def steps(self) -> tuple[RecordedStep, ...]:
        """Empty where there is none, or one whose element is not in its page."""
        can_be_done = all(action.pos_candidates for action in self.actions)
        return tuple(map(_step, self.actions)) if can_be_done else ()


@dataclass(frozen=True, slots=True)
class _StepByStep:
    """A task whose steps are rows."""

    text: str
    num_steps: int
    steps: dict[int, tuple[RecordedStep, ...]]
    """By their place; empty where a step's element is not in its page."""


def _recordings(rows: Iterable[_TaskRow]) -> Iterator[Recording]:
    """Those that can be done, whole."""
    tasks: dict[str, _StepByStep] = {}
    for row in rows:
        steps, place = row.steps(), row.target_action_index
        if place is not None:
            task = tasks.setdefault(row.annotation_id, _StepByStep(row.text, len(row.action_reprs), {}))
            task.steps.setdefault(place, steps)
        elif steps:
            yield Recording(row.text, steps)
    for task in tasks.values():
        if len(task.steps) == task.num_steps and all(task.steps.values()):
            yield Recording(task.text, tuple(step for place in sorted(task.steps) for step in task.steps[place]))


def _step(action: _ActionRow) -> RecordedStep:
    right = sorted(action.pos_candidates, key=lambda each: not each.is_original_target)
    others = Random(action.action_uid).sample(action.neg_candidates, min(NUM_OTHERS, len(action.neg_candidates)))
    page = _Page(action.cleaned_html)
    elements = sorted([*right, *others], key=lambda each: page.places.get(each.backend_node_id, 0))
    return RecordedStep(
        page="\n".join(_written(each, page) for each in elements),
        right_elements=tuple(each.backend_node_id for each in right),
        tool=_TOOL_OF_OPERATION[action.operation.op],
        value=action.operation.value,
    )


def _written(candidate: _Candidate, page: _Page) -> str:
    words = " ".join(page.texts.get(candidate.backend_node_id, "").split())
    named = " ".join(
        f"{key}={candidate.attributes[key]!r}"
        for key in ("id", "role", "type", "name", "aria_label", "placeholder", "title", "alt", "value")
        if candidate.attributes.get(key)
    )
    return f"[{candidate.backend_node_id}] {candidate.tag} {named} {words}"[:LONGEST_ELEMENT].rstrip()


class _Page(HTMLParser):
    """The texts of a page's elements by `backend_node_id`, and their order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.places: dict[str, int] = {}
        self._open: list[tuple[str, str | None]] = []
        self.feed(html)

    def parse_marked_section(self, i: int, report: int = 1) -> int:
        """`<![...`, of which the parser knows some and raises AssertionError for others; browsers read a comment."""
        return self.parse_bogus_comment(i, report)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        id = dict(attrs).get("backend_node_id")
        if id is not None:
            self.places[id] = len(self.places)
            self.texts.setdefault(id, "")
        if tag not in ("input", "br", "img", "hr", "meta", "link"):
            self._open.append((tag, id))

    def handle_endtag(self, tag: str) -> None:
        if tag in [name for name, _ in self._open]:
            while self._open and self._open.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        for _, id in self._open:
            if id is not None and data.strip() and len(self.texts[id]) < LONGEST_ELEMENT:
                self.texts[id] += f" {data.strip()}"
