"""Microsoft Presidio as a hook: `--redact runtime.privacy.presidio:redact`, with the extra `presidio`.

E-mail addresses, card and account numbers and the like become `[redacted EMAIL_ADDRESS]`. Names of persons and places
need a model of spaCy's, installed beforehand and named by STEPAGENT_PRESIDIO_MODEL (`en_core_web_lg`); without one
Presidio goes by shapes alone. The language is STEPAGENT_PRESIDIO_LANGUAGE (default `en`).
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

LEAST_SCORE = 0.5
"""Of a finding, in [0, 1]: below, Presidio guesses."""


@cache
def _analyzer(language: str, model: str) -> Any:
    from presidio_analyzer import AnalyzerEngine  # pyright: ignore[reportMissingImports]
    from presidio_analyzer.nlp_engine import SpacyNlpEngine  # pyright: ignore[reportMissingImports]

    if model:
        engine = SpacyNlpEngine(models=[{"lang_code": language, "model_name": model}])
    else:
        from spacy import blank  # pyright: ignore[reportMissingImports]

        engine = SpacyNlpEngine()
        engine.nlp = {language: blank(language)}  # splits words, and has no model to load
    return AnalyzerEngine(nlp_engine=engine, supported_languages=[language])


def redact(text: str) -> str:
    """The text with a placeholder for each finding."""
    if not text.strip():
        return text
    language = os.environ.get("STEPAGENT_PRESIDIO_LANGUAGE", "en")
    found = _analyzer(language, os.environ.get("STEPAGENT_PRESIDIO_MODEL", "")).analyze(text, language=language)
    return replaced(text, [(each.start, each.end, each.entity_type) for each in found if each.score >= LEAST_SCORE])


def replaced(text: str, found: list[tuple[int, int, str]]) -> str:
    """`found`: (begin, end, kind). Of findings that overlap the one that begins first counts, the longest of those."""
    kept, at = list[str](), 0
    for begin, end, kind in sorted(found, key=lambda each: (each[0], -each[1])):
        if begin >= at:
            kept += [text[at:begin], f"[redacted {kind}]"]
            at = end
    return "".join([*kept, text[at:]])
