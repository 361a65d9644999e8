"""Bodies of the right form with values that nobody means: a 4xx, and nobody else's answer is the worse for it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from policies.chat.chat_protocol import ChatProtocol
from runtime.engines.embedded.engine import EmbeddedEngine
from runtime.http.schemas import WireModel
from tests.serving import MODEL, Served, parts_of, served


@pytest.fixture
def server(engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path) -> Iterator[Served]:
    with served(parts_of(engine, protocol, tmp_path)) as running:
        yield running


def chat(server: Served, **more: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "tools": [], "max_tokens": 30, **more}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def _of_type(kind: str, schema: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Everything of this type in a schema, and where it stands."""
    if isinstance(schema, dict):
        if schema.get("type") == kind:
            yield place, schema
        for name, inner in schema.items():
            yield from _of_type(kind, inner, f"{place}/{name}")
    elif isinstance(schema, list | tuple):
        for number, inner in enumerate(schema):
            yield from _of_type(kind, inner, f"{place}/{number}")


def _kinds_of(model: type) -> Iterator[type]:
    for kind in model.__subclasses__():
        yield from (kind, *_kinds_of(kind))


def test_every_whole_number_of_every_route_has_bounds_that_the_engine_and_the_log_can_hold(server: Served) -> None:
    """`top_k` had none above: one beyond 64 bits failed the forward pass of everybody whose prompt was in it."""
    described = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    schemas, bodies = described["components"]["schemas"], {model.__name__ for model in _kinds_of(WireModel)}
    parameters = [
        operation.get("parameters", []) for path in described["paths"].values() for operation in path.values()
    ]
    found = list(
        _of_type("integer", [parameters, {name: schema for name, schema in schemas.items() if name in bodies}])
    )
    assert len(found) > 20
    for place, number in found:
        most = number.get("maximum", number.get("exclusiveMaximum", float("inf")))
        least = number.get("minimum", number.get("exclusiveMinimum", float("-inf")))
        assert -(2**63) <= least <= most <= 2**63, place


def test_the_description_of_the_routes_says_what_the_fields_mean(server: Served) -> None:
    """What stood under a field in the source was told to nobody: not that an outcome of 0.99 is no success."""
    schemas = httpx.get(f"{server.url}/openapi.json", timeout=60).json()["components"]["schemas"]
    outcome = schemas["OutcomeRequest"]["properties"]
    assert "Only exactly 1 is learned from as a success" in outcome["value"]["description"]
    fields = [field for each in schemas.values() for field in each.get("properties", {}).values()]
    assert sum("description" in field for field in fields) > 40


def test_every_list_of_every_request_is_refused_at_its_first_wrong_item() -> None:
    """A message of 1.9 million wrong parts made as many errors, of which one was told: nobody else was answered for
    18 seconds."""
    found = [
        each
        for model in _kinds_of(WireModel)
        for each in _of_type("list", model.__pydantic_core_schema__, model.__name__)
    ]
    assert len(found) > 20
    assert [place for place, each in found if not each.get("fail_fast")] == []


@pytest.mark.parametrize("body", [{"top_k": 2**63}, {"top_k": 2**64 - 1}, {"max_tokens": 2**63}, {"seed": 2**63}])
def test_a_number_beyond_the_engines_is_refused_beside_others_who_are_answered(
    server: Served, body: dict[str, Any]
) -> None:
    with ThreadPoolExecutor(8) as threads:
        good = [threads.submit(chat, server, top_k=5, temperature=1.0, max_tokens=60) for _ in range(4)]
        bad = [threads.submit(chat, server, **body) for _ in range(4)]
    assert [each.result().status_code for each in bad] == [400] * 4
    assert [each.result().status_code for each in good] == [200] * 4


TOO_LARGE = {
    "a list of a hundred million": {"type": "array", "minItems": 100_000_000, "items": {"type": "null"}},
    "two thousand objects": {
        "anyOf": [{"type": "object", "properties": {f"k{number}": {"type": "string"}}} for number in range(2000)]
    },
}


@pytest.mark.parametrize("schema", TOO_LARGE.values(), ids=TOO_LARGE)
@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_no_grammar_can_hold_to_is_the_requests_fault(
    server: Served, schema: dict[str, Any], stream: bool
) -> None:
    """It was a 503, which clients send again and again by themselves."""
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = chat(server, response_format=asked, temperature=0, stream=stream)
    if stream:
        assert '"code":"grammar_failed"' in answer.text.replace(" ", "")
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "grammar_failed")
    assert chat(server).status_code == 200
