"""Scripted experts for MiniWoB++ pages: from what is asked, and what the accessibility tree shows, to the next action.

A script says what is to be true of the page, in order, and acts on the first thing that is not: so it knows the way
from wherever the page is, as long as the page can still be put right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from tools.worlds.simulators.live import RawCall

_LINE = re.compile(r'^( *)- ([a-z]+)(?: "((?:[^"\\]|\\.)*)")?((?: \[[^\]]*\])*)(?::(?: (.*))?)?$')
_REF = re.compile(r"\[ref=([a-z0-9]+)\]")


class NoScript(Exception):
    """The page does not show what the script looks for."""


@dataclass(frozen=True, slots=True)
class Element:
    """One line of the accessibility tree."""

    depth: int
    role: str
    name: str
    marks: str
    """Such as `[checked] [ref=e7]`."""
    text: str

    @property
    def ref(self) -> str:
        """What the tools call it; empty where it cannot be acted on."""
        found = _REF.search(self.marks)
        return found[1] if found else ""

    def is_marked(self, mark: str) -> bool:
        return f"[{mark}]" in self.marks

    @property
    def label(self) -> str:
        """What is to be read there."""
        return self.name or self.text


def _unquoted(text: str | None) -> str:
    if text is None:
        return ""
    if text.startswith('"') and text.endswith('"') and len(text) > 1:
        return json.loads(text)
    return text


def read_tree(snapshot: str) -> list[Element]:
    """The lines of a snapshot."""
    elements = []
    for line in snapshot.splitlines():
        indent = len(line) - len(line.lstrip())
        body = line.strip()[2:]
        if body.startswith("'"):  # YAML puts a key that holds a colon or a hash in quotes
            end = body.rfind("'")
            body = body[1:end].replace("''", "'") + body[end + 1 :]
        if found := _LINE.match(f"{' ' * indent}- {body}"):
            name = json.loads(f'"{found[3]}"') if found[3] else ""
            elements.append(Element(indent, found[2], name, found[4] or "", _unquoted(found[5])))
    return elements


class Page:
    """What a script looks at."""

    def __init__(self, utterance: str, snapshot: str, done: Sequence[RawCall]) -> None:
        self.utterance = utterance
        self.elements = read_tree(snapshot)
        self.done = done
        self._typed = {str(call["ref"]): str(call["text"]) for name, call in done if name == "type"}

    def asked(self, pattern: str) -> tuple[str, ...]:
        """The groups of a pattern in what is asked."""
        found = re.search(pattern, self.utterance)
        if found is None:
            raise NoScript(pattern)
        return found.groups()

    def all(self, *roles: str) -> list[Element]:
        return [element for element in self.elements if element.role in roles and element.ref]

    def one(self, label: str, *roles: str) -> Element:
        """The first element with this label, of one of these roles or of any."""
        for element in self.elements:
            if element.ref and element.label.strip() == label and (not roles or element.role in roles):
                return element
        raise NoScript(label)

    def holds(self, box: Element, text: str) -> bool:
        """Whether a text box holds a text; what a password or a date box holds cannot be read as it was typed."""
        return box.text == text or self._typed.get(box.ref) == text

    def last_clicked(self, elements: Iterable[Element]) -> Element | None:
        by_ref = {element.ref: element for element in elements}
        clicks = [by_ref[call["ref"]] for name, call in self.done if name == "click" and call["ref"] in by_ref]
        return clicks[-1] if clicks else None


def _click(element: Element) -> RawCall:
    return "click", {"ref": element.ref}


def _type(element: Element, text: str) -> RawCall:
    return "type", {"ref": element.ref, "text": text}


def _fill(page: Page, wanted: Iterable[tuple[Element, str]], button: Element) -> RawCall:
    """Fill text boxes, then click."""
    for box, text in wanted:
        if not page.holds(box, text):
            return _type(box, text)
    return _click(button)


def _fill_boxes(page: Page, texts: Iterable[str], button: str) -> RawCall:
    return _fill(page, zip(page.all("textbox"), texts, strict=False), page.one(button, "button"))


# ----------------------------------------------------------------------------------------------- scripts


def _named_button(page: Page) -> RawCall:
    return _click(page.one(*page.asked(r'"(.+?)" button'), "button"))


def _dialog(page: Page) -> RawCall:
    (label,) = page.asked(r'labeled "(.+?)"')
    return _click(page.one("Close" if label == "x" else label, "button"))


def _options(page: Page) -> RawCall:
    """Radio buttons and check boxes: those that are asked for are on, the others off."""
    (asked,) = page.asked(r"^Select (.+) and click Submit")
    wanted = set(asked.split(", "))
    for box in page.all("checkbox", "radio"):
        if box.is_marked("checked") != (box.name in wanted):
            return _click(box)
    return _click(page.one("Submit", "button"))


def _tab(page: Page) -> RawCall:
    return _click(page.one(*page.asked(r"(Tab #\d)"), "link"))


def _list(page: Page) -> RawCall:
    (wanted,) = page.asked(r"^Select (.+) from the list")
    if any(
        element.role == "option" and element.is_marked("selected") and element.name == wanted
        for element in page.elements
    ):
        return _click(page.one("Submit", "button"))
    return _type(page.all("combobox")[0], wanted)


def _text(page: Page) -> RawCall:
    return _fill_boxes(page, page.asked(r'^Enter "(.*)" into'), "Submit")


def _cased_text(page: Page) -> RawCall:
    text, case = page.asked(r'^Type "(.*)" in all (lower|upper) case')
    return _fill_boxes(page, [text.lower() if case == "lower" else text.upper()], "Submit")


def _password(page: Page) -> RawCall:
    (password,) = page.asked(r'password "(.*)" into')
    return _fill_boxes(page, [password, password], "Submit")


def _date(page: Page) -> RawCall:
    month, day, year = page.asked(r"(\d\d)/(\d\d)/(\d{4})")
    return _fill_boxes(page, [f"{year}-{month}-{day}"], "Submit")


def _time(page: Page) -> RawCall:
    hour, minute, half = page.asked(r"(\d+):(\d\d)\s*([AP])M")
    return _fill_boxes(page, [f"{int(hour) % 12 + 12 * (half == 'P'):02}:{minute}"], "Submit")


def _login(page: Page) -> RawCall:
    return _fill_boxes(page, page.asked(r'username "(.*)" and the password "(.*)" into'), "Login")


def _cells(page: Page) -> dict[str, str]:
    cells = [element.label for element in page.elements if element.role == "cell"]
    return dict(zip(cells[::2], cells[1::2], strict=False))


def _cell(page: Page) -> RawCall:
    (label,) = page.asked(r"value of (.+) into the")
    return _fill_boxes(page, [_cells(page)[label]], "Submit")


def _cells_by_label(page: Page) -> RawCall:
    labels = [element.text.rstrip(":") for element in page.all("generic") if element.text.endswith(":")]
    return _fill_boxes(page, [_cells(page)[label] for label in labels], "Submit")


def _shown(page: Page, pattern: str) -> tuple[str, ...]:
    for element in page.elements:
        if found := re.fullmatch(pattern, element.label.strip()):
            return found.groups()
    raise NoScript(pattern)


def _arithmetic(page: Page) -> RawCall:
    left, sign, right = _shown(page, r"(-?\d+) ([x+-]) (-?\d+) =")
    results = {"x": int(left) * int(right), "+": int(left) + int(right), "-": int(left) - int(right)}
    return _fill_boxes(page, [str(results[sign])], "Submit")


def _algebra(page: Page) -> RawCall:
    left, sign, right, result = _shown(page, r"(x|-?\d+) ([+-]) (x|-?\d+) = (-?\d+)")

    def excess(x: int) -> int:
        a, b = (x if term == "x" else int(term) for term in (left, right))
        return (a + b if sign == "+" else a - b) - int(result)

    return _fill_boxes(page, [str(Fraction(-excess(0), excess(1) - excess(0)))], "Submit")


def _word(page: Page) -> RawCall:
    (place,) = page.asked(r"the (\d+)\w\w word")
    words = page.all("paragraph")[0].text.split()
    return _fill_boxes(page, [re.sub(r"[^a-zA-Z0-9]", "", words[int(place) - 1])], "Submit")


def _movies(page: Page) -> RawCall:
    """A form whose looks change: a box is told by its own name, or by the words before it or after it."""
    genre, director, year = page.asked(r"^Search for (.+) movies directed by (.+) from year (\d+)")
    texts = {"genre": genre, "director": director, "year": year, "released": year}
    boxes = page.all("textbox")
    told = [element.name if element.role == "textbox" else element.label for element in page.elements[2:]]
    labels = [word for text in told for word in texts if word in text.lower()]
    wanted = [(box, texts[label]) for box, label in zip(boxes, labels, strict=True)]
    buttons = [element for element in page.elements if element.ref and re.match("Submit|Search|Go", element.label)]
    return _fill(page, wanted, buttons[-1])


def _minutes(text: str) -> int:
    return sum(int(number) * (60 if unit == "h" else 1) for number, unit in re.findall(r"(\d+)([hm])", text))


def _ticket(page: Page) -> RawCall:
    (wish,) = page.asked(r"(cheapest|shortest|longest|most expensive)")
    buttons = [element for element in page.all("button") if element.name.startswith("Book for")]
    prices = [int(re.sub(r"\D", "", button.name)) for button in buttons]
    durations = [_minutes(element.text) for element in page.all("generic") if re.match(r"\d+h", element.text)]
    measures = prices if wish in ("cheapest", "most expensive") else durations
    best = (min if wish in ("cheapest", "shortest") else max)(measures)
    return _click(buttons[measures.index(best)])


def _parity(page: Page) -> RawCall:
    shown = [element for element in page.elements if element.role == "button" or re.fullmatch(r"-?\d+", element.label)]
    for odd, number, even in zip(shown[0:-1:3], shown[1:-1:3], shown[2:-1:3], strict=True):
        right = odd if int(number.label) % 2 else even
        if page.last_clicked((odd, even)) != right:
            return _click(right)
    return _click(shown[-1])


def _search(page: Page) -> RawCall:
    name, place = page.asked(r'enter "(.+?)" and press "Search", .* the (\d+)\w\w search result')
    box = page.all("textbox")[0]
    if not page.holds(box, name):
        return _type(box, name)
    pages = [element for element in page.all("link") if re.fullmatch(r"\d+", element.name)]
    results = [e for e in page.all("link") if e not in pages and e.name not in ("<", ">", "First", "Last")]
    if not results:
        return _click(page.one("Search", "button"))
    number = (int(place) - 1) // 3
    shown = page.last_clicked(pages)
    if (shown.name if shown else "1") != str(number + 1):
        return _click(page.one(str(number + 1), "link"))
    return _click(results[(int(place) - 1) % 3])


SCRIPTS: dict[str, Callable[[Page], RawCall]] = {
    "click-button": _named_button,
    "unicode-test": _named_button,
    "click-dialog-2": _dialog,
    "click-option": _options,
    "click-checkboxes": _options,
    "click-checkboxes-transfer": _options,
    "click-checkboxes-large": _options,
    "click-tab": _tab,
    "choose-list": _list,
    "enter-text": _text,
    "enter-text-dynamic": _text,
    "enter-text-2": _cased_text,
    "enter-password": _password,
    "enter-date": _date,
    "enter-time": _time,
    "login-user": _login,
    "read-table": _cell,
    "read-table-2": _cells_by_label,
    "simple-arithmetic": _arithmetic,
    "simple-algebra": _algebra,
    "find-word": _word,
    "multi-layouts": _movies,
    "multi-orderings": _movies,
    "buy-ticket": _ticket,
    "odd-or-even": _parity,
    "search-engine": _search,
}
"""By the page's name."""


def next_action(page_name: str, utterance: str, snapshot: str, done: Sequence[RawCall]) -> RawCall | None:
    """The expert's next action; None where its script does not fit the page any more."""
    try:
        return SCRIPTS[page_name](Page(utterance, snapshot, done))
    except (NoScript, LookupError, ValueError):
        return None
