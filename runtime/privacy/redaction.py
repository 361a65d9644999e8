"""Takes secrets out of what clients and tools say, before anything of it is rendered, logged or learned.

A secret becomes a placeholder, `[redacted api-key]`. The policy is given the placeholder too: what it saw, what is
logged and what is trained on are the same tokens, and a conversation that is sent again is recognised, since the same
text is redacted the same way. What the policy itself writes is not touched: its tokens are logged as they were sampled,
and it cannot repeat a secret that it was never shown.

Not covered: names of fields and of tools, ids, users (they tell conversations apart), images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

from policies.types import Message
from runtime.privacy.secret_shapes import SHAPES, Shape

Hook = Callable[[str], str]
"""A text to what may be kept of it."""

_WINDOW, _LONGEST = 64 * 1024, 16 * 1024
"""Letters that one search goes through, and the longest secret that is found whole at a window's end: a search holds
up all other requests."""

NAMES = frozenset(
    """
    role type model id call_id tool_call_id item_id previous_response_id step_id episode_id task purpose trial
    copied_from name user safety_identifier prompt_cache_key status effort format service_tier tool_choice object
    path parent cycle expected_acting expert
    """.split()
)
"""Fields whose value is a name and no text."""
_OF_METADATA = frozenset({"episode_id", "task", "purpose", "trial", "copied_from", "user_id"})
_FREE = frozenset({"metadata", "provenance", "input", "arguments", "properties"})
"""Fields in which a client may call its own fields as it likes."""


class RedactionFailed(Exception):
    """A hook has failed: nothing is done with the text, since nobody knows what it holds."""


class UnknownHook(ValueError):
    """An import path that names no function, and why."""


@dataclass(slots=True)
class Redactor:
    """Redacts texts, and whatever holds texts."""

    shapes: Sequence[Shape] = SHAPES
    hooks: Sequence[Hook] = ()

    @property
    def is_slow(self) -> bool:
        """Whether a short text may take longer than others should wait."""
        return bool(self.hooks)

    def text(self, text: str) -> tuple[str, int]:
        """(the text with placeholders, how many there are). Raises RedactionFailed."""
        number = 0
        lower = text.lower() if text and self.shapes else ""
        for shape in self.shapes:
            if any(hint in lower for hint in shape.hints):
                text, found = _replaced(shape, text)
                number += found
        for hook in self.hooks:
            text, found = _hooked(hook, text)
            number += found
        return text, number

    def body(self, value: Any) -> tuple[Any, int]:
        """A request's body, read from JSON: every text in it that is no name."""
        counted = [0]
        return self._walk(value, frozenset(), counted), counted[0]

    def message(self, message: Message) -> Message:
        """As a client will be redacted when it sends this message back."""
        return self._walk(message, frozenset(), [0])

    def _walk(self, value: Any, names: frozenset[str], counted: list[int]) -> Any:
        """`names`: the fields here that hold no text; empty: those of the wire's forms."""
        if isinstance(value, str):
            text, number = self.text(value)
            counted[0] += number
            return text
        if isinstance(value, list):
            return [self._walk(each, names, counted) for each in value]
        if not isinstance(value, dict):
            return value
        own = names or NAMES
        return {
            name: each
            if name in own and isinstance(each, str)
            else self._walk(each, _OF_METADATA if name in _FREE and isinstance(each, dict) else names, counted)
            for name, each in value.items()
        }


def load_hook(path: str) -> Hook:
    """The function behind `package.module:function`. Raises UnknownHook."""
    module_name, _, name = path.partition(":")
    try:
        hook: Any = getattr(import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnknownHook(
            f"{path!r} names no function that can be imported ({error}): package.module:function"
        ) from None
    if not callable(hook):
        raise UnknownHook(f"{path!r} is no function")
    return cast(Hook, hook)


def _replaced(shape: Shape, text: str) -> tuple[str, int]:
    """With a placeholder for each secret of this shape."""
    kept, at, number = list[str](), 0, 0
    for match in _matches(shape.pattern, text):
        begin, end = match.span("secret" if "secret" in shape.pattern.groupindex else 0)
        kept += [text[at:begin], f"[redacted {shape.name}]"]
        at, number = end, number + 1
    return ("".join([*kept, text[at:]]), number) if number else (text, 0)


def _matches(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """As `finditer`, in windows."""
    at = 0
    for window in range(0, len(text), _WINDOW):
        end = window + _WINDOW
        at = max(at, window)
        while at < end and (match := pattern.search(text, at, end + _LONGEST)) and match.start() < end:
            yield match
            at = max(match.end(), at + 1)


def _hooked(hook: Hook, text: str) -> tuple[str, int]:
    try:
        kept = hook(text)
    except Exception as error:  # foreign code: its words may quote the text
        raise RedactionFailed(f"the hook {hook.__qualname__} failed with {type(error).__name__}") from None
    if not isinstance(kept, str):
        raise RedactionFailed(f"the hook {hook.__qualname__} gave {type(kept).__name__} where it was given a text")
    return kept, int(kept != text)
