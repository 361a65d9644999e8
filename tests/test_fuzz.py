"""Schemathesis over the served OpenAPI document: whatever is sent, the answer is one that the document tells of."""

from __future__ import annotations

from pathlib import Path

import httpx
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from policies.chat.chat_protocol import ChatProtocol
from tests.serving import MODEL, SayingEngine, parts_of, served

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
GOOD = {"messages": [{"role": "user", "content": "Hi"}], "input": "Hi"}
"""No random body has these and the model, and what stands behind their checks would never be reached."""


def test_nothing_that_is_sent_makes_a_server_error(protocol: ChatProtocol, tmp_path: Path) -> None:
    with served(parts_of(SayingEngine(protocol), protocol, tmp_path)) as server:
        document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [found.ok() for found in document.get_all_operations()]
        assert len(operations) >= 12
        for operation in operations:

            @given(case=operation.as_strategy(), is_nearly_good=st.booleans())
            @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            def send(case: schemathesis.Case, is_nearly_good: bool) -> None:
                if is_nearly_good and isinstance(case.body, dict) and (asked := GOOD.keys() & case.body.keys()):
                    case.body |= {"model": MODEL, **{name: GOOD[name] for name in asked}}
                case.call_and_validate(checks=CHECKS, timeout=30)

            send()
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert server.parts.log.counts()["steps"] > 0, "some of it was answered"
        assert server.parts.log.verify() == []
