"""Schemathesis over the served OpenAPI document: whatever is sent, the server answers in its own words and lives."""

from __future__ import annotations

from pathlib import Path

import httpx
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error

from policies.chat_protocol import ChatProtocol
from tests.serving import SayingEngine, parts_of, served


def test_nothing_that_is_sent_makes_a_server_error(protocol: ChatProtocol, tmp_path: Path) -> None:
    with served(parts_of(SayingEngine(protocol), protocol, tmp_path)) as server:
        document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [found.ok() for found in document.get_all_operations()]
        assert len(operations) >= 12
        for operation in operations:

            @given(case=operation.as_strategy())
            @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            def send(case: schemathesis.Case) -> None:
                case.call_and_validate(checks=[not_a_server_error], timeout=30)

            send()
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert server.parts.log.verify() == []
