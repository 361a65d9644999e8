"""Microsoft Presidio as a hook: `--redact runtime.privacy.presidio:redact`, with the extra `presidio`.

Names, e-mail addresses, telephone and card numbers and the like become `[redacted PERSON]`. The language is
STEPAGENT_PRESIDIO_LANGUAGE (default `en`); names of persons and places need spaCy's model for it, which Presidio asks
for at its first use.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

LEAST_SCORE = 0.5
"""Of a finding, in [0, 1]: below, Presidio guesses."""


@cache
def _analyzer() -> Any:
    from presidio_analyzer import AnalyzerEngine  # pyright: ignore[reportMissingImports]

    return AnalyzerEngine()


def redact(text: str) -> str:
    """The text with a placeholder for each finding."""
    found = _analyzer().analyze(text, language=os.environ.get("STEPAGENT_PRESIDIO_LANGUAGE", "en"))
    return replaced(text, [(each.start, each.end, each.entity_type) for each in found if each.score >= LEAST_SCORE])


def replaced(text: str, found: list[tuple[int, int, str]]) -> str:
    """`found`: (begin, end, kind). Of findings that overlap the one that begins first counts, the longest of those."""
    kept, at = list[str](), 0
    for begin, end, kind in sorted(found, key=lambda each: (each[0], -each[1])):
        if begin >= at:
            kept += [text[at:begin], f"[redacted {kind}]"]
            at = end
    return "".join([*kept, text[at:]])
