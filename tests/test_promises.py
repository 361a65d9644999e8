"""The promises of the house. Breaking one is a decision, not a fix."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from learner.objectives import action_row
from learner.prefix_tree import pack_rows
from tests.serving import Served

QUESTION = {"role": "user", "content": "Order 1000 has come in. Please see to it."}


def ask(server: Served, **options: object) -> object:
    body = {"model": "novice", "messages": [QUESTION], "temperature": 0, **options}
    return server.client().chat.completions.with_raw_response.create(**body)  # type: ignore[call-overload]


def test_2_prompt_and_tool_output_tokens_are_never_trained_on() -> None:
    prompt, completion = tuple(range(10, 30)), (1, 2, 3)
    (pack,) = pack_rows([action_row(prompt, completion, ("episode", "step"))], token_budget=100)
    (scored,) = pack.scored_rows
    assert tuple(scored.target_ids) == completion


def test_3_every_logged_step_rebuilds_to_exactly_the_ids_the_engine_saw(serve_scripted) -> None:
    server = serve_scripted("Hello.", "Good bye.")
    first = ask(server).parse()  # type: ignore[attr-defined]
    more = [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "Ta-ta ü!"}]
    ask(server, messages=[QUESTION, *more])
    log, engine = server.parts.log, server.parts.engine
    (episode,) = log.episodes()
    assert [step.prompt_token_ids for step in log.steps(episode.id)] == engine.prompts
    assert log.verify() == []


def test_5_rollback_needs_no_learner(serve_scripted) -> None:
    server = serve_scripted()
    # No learner runs here; with nothing behind, the runtime itself answers, and says so.
    refused = server.client().with_options(max_retries=0)
    with pytest.raises(Exception, match="nothing to roll back to"):
        refused.post("/adapters/rollback", cast_to=object, body={})


def test_6_fact_rows_are_never_edited(serve_scripted, tmp_path: Path) -> None:
    ask(serve_scripted("Hello."))
    with sqlite3.connect(tmp_path / "agent.db") as database:
        for table in ("episodes", "steps"):
            with pytest.raises(sqlite3.IntegrityError):
                database.execute(f"UPDATE {table} SET adapter = 'another'")


def test_7_without_a_learner_serving_is_unchanged(serve_scripted) -> None:
    assert ask(serve_scripted("Hello.")).parse().choices[0].message.content == "Hello."  # type: ignore[attr-defined]


def test_8_an_answered_step_is_on_disk(serve_scripted, tmp_path: Path) -> None:
    step_id = ask(serve_scripted("Hello.")).headers["x-step-id"]  # type: ignore[attr-defined]
    with sqlite3.connect(tmp_path / "agent.db") as database:
        assert database.execute("SELECT count(*) FROM steps WHERE id = ?", [step_id]).fetchone() == (1,)
