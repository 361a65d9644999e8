"""Mind2Web from its published files (`train_0.json` and its like): recorded tasks on real web sites.

A recording goes on only the recorded way: the next page comes after the right action on the right element, and any
other action ends the episode. The outcome is 1 where every step was right, the paper's task success. Of a page the
right elements and some of the others are shown, in the order of the page; a task with a step whose element is not in
the published page is left out, because nobody could do it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

from tools.worlds.calls import ToolEpisode, ToolSchema, answering, calling, shown
from tools.worlds.listed import ListedWorld, split_of_file
from tools.worlds.question_files import read_text
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
        try:
            recordings = [_recording(entry) for entry in json.loads(read_text(file))]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file} is none of Mind2Web's: {type(error).__name__} {error}") from error
        super().__init__(split_of_file(file, [recording for recording in recordings if recording is not None]))

    def messages_of(self, item: Recording) -> tuple[Message, ...]:
        return ({"role": "user", "content": shown(f"{item.text}\n\n{item.steps[0].page}")},)

    def open_item(self, item: Recording) -> Mind2WebEpisode:
        return Mind2WebEpisode(item)


# --------------------------------------------------------------------------------------------------- files


def _recording(entry: dict[str, Any]) -> Recording | None:
    """None where a step's element is not in its page."""
    actions = entry["actions"]
    if not actions or not all(action["pos_candidates"] for action in actions):
        return None
    text = f"On the web site {entry['website']}: {entry['confirmed_task']}"
    return Recording(text, tuple(_step(action) for action in actions))


def _step(action: dict[str, Any]) -> RecordedStep:
    right = [each for each in action["pos_candidates"] if each.get("is_original_target")]
    right += [each for each in action["pos_candidates"] if not each.get("is_original_target")]
    others = action["neg_candidates"]
    others = Random(action["action_uid"]).sample(others, min(NUM_OTHERS, len(others)))
    page = _Page(action["cleaned_html"])
    elements = sorted([*right, *others], key=lambda each: page.places.get(str(each["backend_node_id"]), 0))
    operation = action["operation"]
    return RecordedStep(
        page="\n".join(_written(each, page) for each in elements),
        right_elements=tuple(str(each["backend_node_id"]) for each in right),
        tool=_TOOL_OF_OPERATION[operation["op"]],
        value=operation.get("value") or "",
    )


def _written(candidate: dict[str, Any], page: _Page) -> str:
    id = str(candidate["backend_node_id"])
    words = " ".join(page.texts.get(id, "").split())
    attributes = json.loads(candidate["attributes"]) if isinstance(candidate.get("attributes"), str) else {}
    named = " ".join(
        f"{key}={attributes[key]!r}"
        for key in ("id", "role", "type", "name", "aria_label", "placeholder", "title", "alt", "value")
        if attributes.get(key)
    )
    return f"[{id}] {candidate['tag']} {named} {words}"[:LONGEST_ELEMENT].rstrip()


class _Page(HTMLParser):
    """The texts of a page's elements by `backend_node_id`, and their order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.places: dict[str, int] = {}
        self._open: list[tuple[str, str | None]] = []
        self.feed(html)

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
