"""Every field of OpenAI's requests has its rule: honoured, without effect, or refused. A new one fails here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params

from benchmarks.clients import field_tables
from runtime.http.fields import BESIDE_OPENAIS, CHAT_FIELDS, MESSAGE_FIELDS, RESPONSE_FIELDS, Rule, Treatment
from runtime.http.messages_schemas import MessagesRequest
from runtime.http.responses_schemas import ResponsesRequest
from runtime.http.schemas import ChatCompletionRequest

CHAT = chat_params.CompletionCreateParamsBase.__annotations__ | {"stream": bool}
RESPONSES = response_params.ResponseCreateParamsBase.__annotations__ | {"stream": bool}


@pytest.mark.parametrize(("known", "rules"), [(CHAT, CHAT_FIELDS), (RESPONSES, RESPONSE_FIELDS)])
def test_every_field_of_the_package_has_a_rule(known: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    assert not set(known) - set(rules), "decide what becomes of these, in runtime/http/fields.py"


@pytest.mark.parametrize(
    ("rules", "schema"),
    [
        (CHAT_FIELDS | BESIDE_OPENAIS, ChatCompletionRequest),
        (RESPONSE_FIELDS, ResponsesRequest),
        (MESSAGE_FIELDS, MessagesRequest),
    ],
)
def test_what_is_honoured_is_read_and_nothing_else_is(rules: Mapping[str, Rule], schema: Any) -> None:
    honoured = {name for name, rule in rules.items() if rule.treatment is Treatment.HONOURED}
    assert set(schema.model_fields) - {"warnings"} == honoured


@pytest.mark.parametrize("rules", [CHAT_FIELDS, RESPONSE_FIELDS, MESSAGE_FIELDS])
def test_what_is_not_honoured_has_its_reason(rules: Mapping[str, Rule]) -> None:
    assert all(rule.note for rule in rules.values() if rule.treatment is not Treatment.HONOURED)


def test_the_page_of_clients_has_these_tables() -> None:
    page = (Path(__file__).parent.parent / "docs" / "CLIENTS.md").read_text()
    assert field_tables() in page, "write it anew: python -m benchmarks.clients --write"
