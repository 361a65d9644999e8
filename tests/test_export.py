"""What is exported can be imported again, and is the same; each format is what its own readers take."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.__main__ import main
from learner.importing.demonstrations import ImportedDemonstration, read_demonstrations
from learner.importing.json_lines import Refusal
from policies.chat.chat_protocol import action_message, message_action
from policies.types import (
    Action,
    FinalAnswer,
    FinishReason,
    MalformedAction,
    Message,
    SamplingParams,
    ToolCall,
    ToolCalls,
)
from runtime.store.episodes import (
    Actor,
    Correction,
    Episode,
    Outcome,
    PromptChange,
    Purpose,
    Step,
    StopReason,
    new_id,
)
from runtime.store.erasure import Eraser, Scope
from runtime.store.export import ExportFilter, export
from runtime.store.learning_log import LearningLog, LearningReader, RewardSource, StepReward
from runtime.store.step_log import StepLog
from tests.conftest import ServeScripted

TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "Does it.", "parameters": {"type": "object", "properties": {}}},
}
FREE = {**TOOL["function"], "parameters": {"type": "object", "additionalProperties": True}}  # type: ignore[dict-item]
TOOLS = ({"type": "function", "function": FREE},)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[StepLog]:
    with closing(StepLog(tmp_path / "agent.db")) as opened:
        yield opened


def step(episode: Episode, parent: Step | None, seen: Sequence[Message], action: Action, tools: Any = TOOLS) -> Step:
    """A step with tokens of its own: their number says how far the episode is."""
    before = parent.prompt_token_ids + parent.completion_token_ids if parent else ()
    return Step(
        id=new_id("step"), episode_id=episode.id, parent_id=parent.id if parent else None,
        index=parent.index + 1 if parent else 0, new_messages=tuple(seen), tools=tuple(tools),
        prompt_token_ids=(*before, 7, 8), completion_token_ids=(5, 6), behavior_logprobs=(-0.5, -0.25),
        sampling=SamplingParams(), adapter=episode.adapter, action=action, finish_reason=FinishReason.STOP,
        stop_reason=StopReason.FINAL_ANSWER, tool_results=(), conversation_digest="", created_at=time.time(),
        first_token_ms=1.0, latency_ms=2.0,
    )  # fmt: skip


def episode_of(**fields: Any) -> Episode:
    given: dict[str, Any] = {"actor": Actor.POLICY, "purpose": Purpose.SERVE, "adapter": "agent-v0001"}
    return Episode(id=new_id("ep"), **given | fields)


# ------------------------------------------------------------------------------- importing our own export

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(
    lambda text: text.strip() and "<" not in text and not text.lstrip().startswith("[")
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[list[Message], Action]]:
    """What an agent saw and did, step by step: calls get their results, answers get questions."""
    taken: list[tuple[list[Message], Action]] = []
    seen: list[Message] = [{"role": "user", "content": draw(TEXTS)}]
    if draw(st.booleans()):
        seen.insert(0, {"role": "system", "content": draw(TEXTS)})
    num_calls = 0
    for _ in range(draw(st.integers(1, 4))):
        thinking = draw(st.just("") | TEXTS.map(str.strip))
        if draw(st.booleans()):
            objects = draw(st.lists(st.dictionaries(TEXTS, JSON, max_size=2), min_size=1, max_size=2))
            calls = tuple(ToolCall(f"call_{num_calls + n}", "f", each) for n, each in enumerate(objects))
            num_calls += len(calls)
            action: Action = ToolCalls(calls, draw(st.just("") | TEXTS), thinking)
            after = [{"role": "tool", "tool_call_id": call.id, "content": draw(TEXTS)} for call in calls]
        else:
            action = FinalAnswer(draw(TEXTS), thinking)
            after = [{"role": "user", "content": draw(TEXTS)}]
        taken.append((seen, action))
        seen = after
    return taken


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(conversation=conversations(), task=st.sampled_from([None, "order_desk/train/7"]))
def test_an_export_is_imported_as_what_was_logged(
    tmp_path_factory: pytest.TempPathFactory, conversation: list[tuple[list[Message], Action]], task: str | None
) -> None:
    state = tmp_path_factory.mktemp("state")
    episode = episode_of(task=task)
    with closing(StepLog(state / "agent.db")) as log:
        steps: list[Step] = []
        for seen, action in conversation:
            steps.append(step(episode, steps[-1] if steps else None, seen, action))
        log.append(episode, *steps, Outcome(new_id("out"), episode.id, 1.0, "user")).result()
        reader = LearningReader(state)
        rows = {form: list(export(log, reader, ExportFilter(), form)) for form in ("atif", "openai", "hf")}
    said = [message for seen, action in conversation for message in (*seen, action_message(action))]
    learned = tuple(index for index, message in enumerate(said) if message["role"] == "assistant")
    for form, exported in rows.items():
        file = state / f"{form}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in exported))
        (read,) = read_demonstrations(file)
        assert isinstance(read, ImportedDemonstration), (form, read)
        assert [as_read(message) for message in read.messages] == [as_read(message) for message in said], form
        assert (read.tools, read.learn_from) == (TOOLS, learned)
        assert read.task == (task if form != "openai" else None)


def as_read(message: Message) -> Any:
    """A message with its calls as objects: floats are written in more ways than one."""
    if message["role"] != "assistant":
        return message
    return message_action(message)


def test_branches_are_conversations_and_no_step_is_learned_twice(log: StepLog, tmp_path: Path) -> None:
    episode = episode_of()
    first = step(episode, None, [{"role": "user", "content": "q"}], FinalAnswer("a"))
    ends = [step(episode, first, [{"role": "user", "content": text}], FinalAnswer(text.upper())) for text in ("x", "y")]
    log.append(episode, first, *ends).result()
    for form in ("atif", "openai", "hf"):
        file = tmp_path / f"{form}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in export(log, None, ExportFilter(), form)))
        reads = [read for read in read_demonstrations(file) if isinstance(read, ImportedDemonstration)]
        learned = sorted(read.messages[index]["content"] for read in reads for index in read.learn_from)
        assert learned == ["X", "Y", "a"], form


def test_what_could_not_be_read_is_exported_and_never_learned(log: StepLog, tmp_path: Path) -> None:
    episode = episode_of()
    bad = step(episode, None, [{"role": "user", "content": "q"}], MalformedAction("f(", "no call"))
    good = step(episode, bad, [{"role": "user", "content": "again"}], FinalAnswer("a"))
    log.append(episode, bad, good).result()
    for form in ("atif", "openai", "hf"):
        file = tmp_path / f"{form}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in export(log, None, ExportFilter(), form)))
        (read,) = read_demonstrations(file)
        assert isinstance(read, ImportedDemonstration)
        assert read.learn_from == (3,), form
        assert read.messages[1]["content"] == "f("


@pytest.mark.parametrize("form", ["atif", "hf"])
def test_an_episode_that_failed_is_no_demonstration(log: StepLog, tmp_path: Path, form: str) -> None:
    episode = episode_of()
    log.append(
        episode,
        step(episode, None, [{"role": "user", "content": "q"}], FinalAnswer("a")),
        Outcome(new_id("out"), episode.id, 0.0, "user"),
    ).result()
    file = tmp_path / "failed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in export(log, None, ExportFilter(), form)))
    (read,) = read_demonstrations(file)
    assert isinstance(read, Refusal)
    assert "outcome is 0" in read.reason


CLOCKED = [
    {"role": "system", "content": "It is eleven."},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "r"},
]
"""What a client sends the second time, which has said that it is ten the first time."""


def test_a_conversation_that_a_client_changed_is_another_one(log: StepLog, tmp_path: Path) -> None:
    """It was exported behind what it replaced: two system messages, and everything said twice."""
    episode = episode_of()
    first = step(episode, None, [{"role": "system", "content": "It is ten."}, CLOCKED[1]], FinalAnswer("a"))
    second = replace(step(episode, first, CLOCKED, FinalAnswer("b")), prompt_change=PromptChange.SYSTEM)
    third = step(episode, second, [{"role": "user", "content": "s"}], FinalAnswer("c"))
    log.append(episode, first, second, third).result()
    log.append(Correction(new_id("corr"), third.id, FinalAnswer("C"), (5,), "user")).result()
    (preferred,) = export(log, None, ExportFilter(), "trl")
    assert [message["content"] for message in preferred["prompt"]] == ["It is eleven.", "q", "a", "r", "b", "s"]
    for form in ("atif", "openai", "hf"):
        file = tmp_path / f"{form}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in export(log, None, ExportFilter(), form)))
        reads = [read for read in read_demonstrations(file) if isinstance(read, ImportedDemonstration)]
        said = [([message["content"] for message in read.messages], read.learn_from) for read in reads]
        assert said == [
            (["It is ten.", "q", "a"], (2,)),
            (["It is eleven.", "q", "a", "r", "b", "s", "c"], (4, 6)),
        ], form


def test_an_episode_that_is_being_erased_is_not_exported(log: StepLog, tmp_path: Path) -> None:
    """Its tombstone stands, and its rows go one by one: what is left of them is no whole episode either."""
    gone, stays = episode_of(), episode_of()
    for episode in (gone, stays):
        log.append(episode, step(episode, None, [{"role": "user", "content": "q"}], FinalAnswer("a"))).result()
    Eraser(tmp_path, log).begin([gone.id], Scope.EPISODE, "asked by letter")
    assert [row["session_id"] for row in export(log, None, ExportFilter(), "atif")] == [stays.id]


# ------------------------------------------------------------------------------------------- the formats


def test_atif_has_tokens_logprobs_adapter_and_step_rewards(log: StepLog, tmp_path: Path) -> None:
    episode = episode_of()
    call = ToolCalls((ToolCall("call_0", "f", {"id": 10**24}),), "Well.", "Hm.")
    first = step(episode, None, [{"role": "user", "content": "q"}], call)
    last = step(episode, first, [{"role": "tool", "tool_call_id": "call_0", "content": "r"}], FinalAnswer("a"))
    log.append(episode, first, last).result()
    learning_log = LearningLog(tmp_path)
    learning_log.add_rewards([StepReward(first.id, "c1", RewardSource.EXPERT_AGREEMENT, 0.0)])
    learning_log.close()
    (row,) = export(log, LearningReader(tmp_path), ExportFilter(), "atif")
    user, acted, answered = row["steps"]
    assert row["schema_version"] == "ATIF-v1.8"
    assert (user["source"], acted["source"], answered["message"]) == ("user", "agent", "a")
    assert acted["metrics"]["prompt_token_ids"] == [7, 8]
    assert acted["metrics"]["completion_token_ids"] == [5, 6]
    assert acted["metrics"]["logprobs"] == [-0.5, -0.25]
    assert acted["tool_calls"][0]["arguments"] == {"id": 10**24}
    assert acted["observation"] == {"results": [{"content": "r", "source_call_id": "call_0"}]}
    assert acted["extra"]["stepagent"]["rewards"] == [{"cycle": "c1", "source": "expert_agreement", "value": 0.0}]
    assert acted["extra"]["stepagent"]["adapter"] == "agent-v0001"
    atif = pytest.importorskip("atif", reason="the extra `export` is not installed")
    assert atif.Trajectory.model_validate(row).steps[1].metrics.logprobs == [-0.5, -0.25]


def test_a_correction_is_preferred_to_the_step_it_corrects(log: StepLog) -> None:
    episode = episode_of()
    taken = step(episode, None, [{"role": "user", "content": "q"}], FinalAnswer("wrong"))
    log.append(episode, taken, Correction(new_id("corr"), taken.id, FinalAnswer("right"), (5,), "user")).result()
    assert list(export(log, None, ExportFilter(), "trl")) == [
        {
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "right"}],
            "rejected": [{"role": "assistant", "content": "wrong"}],
            "tools": list(TOOLS),
        }
    ]


def test_calls_of_preferences_are_objects_as_chat_templates_read_them(log: StepLog) -> None:
    """A template that writes `arguments | tojson` would make JSON within JSON of a text."""
    episode = episode_of()
    seen: list[Message] = [
        {"role": "user", "content": "q"},
        action_message(ToolCalls((ToolCall("call_0", "f", {"id": 1}),))),
        {"role": "tool", "tool_call_id": "call_0", "content": "r"},
    ]
    taken = step(episode, None, seen, ToolCalls((ToolCall("call_1", "f", {"id": 2}),)))
    better = ToolCalls((ToolCall("call_2", "f", {"id": 3}),))
    log.append(episode, taken, Correction(new_id("corr"), taken.id, better, (5,), "user")).result()
    (row,) = export(log, None, ExportFilter(), "trl")
    calls = [message["tool_calls"][0]["function"] for message in (row["prompt"][1], *row["chosen"], *row["rejected"])]
    assert [call["arguments"] for call in calls] == [{"id": 1}, {"id": 3}, {"id": 2}]


def test_a_correction_that_says_what_was_done_prefers_nothing(log: StepLog) -> None:
    episode = episode_of()
    taken = step(episode, None, [{"role": "user", "content": "q"}], FinalAnswer("right"))
    log.append(episode, taken, Correction(new_id("corr"), taken.id, FinalAnswer("right"), (5,), "user")).result()
    assert list(export(log, None, ExportFilter(), "trl")) == []


def test_a_corrected_step_of_two_branches_is_one_preference(log: StepLog) -> None:
    episode = episode_of()
    first = step(episode, None, [{"role": "user", "content": "q"}], MalformedAction("f(", "no call"))
    ends = [step(episode, first, [{"role": "user", "content": text}], FinalAnswer(text)) for text in ("x", "y")]
    log.append(episode, first, *ends).result()
    log.append(Correction(new_id("corr"), first.id, FinalAnswer("right"), (5,), "user")).result()
    assert len(list(export(log, None, ExportFilter(), "trl"))) == 1


def test_filters_choose_episodes(log: StepLog) -> None:
    good = episode_of(task="w/train/1", created_at=100.0)
    bad = episode_of(adapter="base", purpose=Purpose.PRACTICE, created_at=200.0)
    for episode, value in ((good, 1.0), (bad, 0.2)):
        taken = step(episode, None, [{"role": "user", "content": "q"}], FinalAnswer("a"))
        log.append(episode, taken, Outcome(new_id("out"), episode.id, value, "user")).result()
    for wanted, found in (
        (ExportFilter(), {good.id, bad.id}),
        (ExportFilter(min_outcome=0.5), {good.id}),
        (ExportFilter(purpose=Purpose.PRACTICE), {bad.id}),
        (ExportFilter(adapter="agent-v0001"), {good.id}),
        (ExportFilter(since=150.0), {bad.id}),
        (ExportFilter(task_prefix="w/train"), {good.id}),
        (ExportFilter(actor=Actor.EXPERT), set()),
    ):
        assert {row["session_id"] for row in export(log, None, wanted, "atif")} == found, wanted


# ------------------------------------------------------------------------------------- command and route


def test_the_command_writes_what_the_server_logged(
    serve_scripted: ServeScripted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server = serve_scripted("Hello.")
    server.client().chat.completions.create(model="novice", messages=[{"role": "user", "content": "Hi"}])
    state = ["--state", str(tmp_path)]
    assert main(["export", "--format", "openai", "--out", str(tmp_path / "o.jsonl"), *state]) == 0
    (read,) = read_demonstrations(tmp_path / "o.jsonl")
    assert isinstance(read, ImportedDemonstration)
    assert read.messages[-1]["content"] == "Hello."
    assert main(["export", "--format", "hf", "--out", str(tmp_path / "traces"), *state]) == 0
    assert len(list((tmp_path / "traces").iterdir())) == 1
    assert main(["export", "--format", "openai", "--out", "x", "--state", str(tmp_path / "none")]) == 1
    assert "start the server once" in capfd.readouterr().err


@pytest.fixture
def one_episode(log: StepLog) -> Episode:
    episode = episode_of()
    log.append(episode, step(episode, None, [{"role": "user", "content": "q"}], FinalAnswer("a"))).result()
    return episode


def exported(tmp_path: Path, form: str, out: Path, *more: str) -> int:
    return main(["export", "--format", form, "--out", str(out), "--state", str(tmp_path), *more])


def test_an_export_that_fails_leaves_what_was_there(
    one_episode: Episode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out, folder = tmp_path / "o.jsonl", tmp_path / "out"
    folder.mkdir()
    out.write_text("of yesterday")
    out.chmod(0o600)

    def full_disk(rows: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("learner.exporting.command.json.dumps", full_disk)
        assert exported(tmp_path, "openai", out) == 1
        assert exported(tmp_path, "hf", folder / "traces") == 1
    assert "o.jsonl was not written: No space left on device" in capfd.readouterr().err
    assert out.read_text() == "of yesterday"
    assert list(folder.iterdir()) == []
    assert exported(tmp_path, "openai", out) == 0
    assert json.loads(out.read_text())["messages"][-1]["content"] == "a"
    assert out.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.glob(".*partial")] == []


def test_a_place_that_cannot_take_the_export_is_told(
    one_episode: Episode, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "of_yesterday.jsonl").write_text("{}")
    for form, out, said in (
        ("openai", tmp_path / "traces", "it is a folder"),
        ("hf", tmp_path / "traces", "the folder is not empty"),
        ("hf", tmp_path / "agent.db", "it is a file"),
        ("atif", tmp_path / "none" / "o.jsonl", "there is no folder"),
    ):
        assert exported(tmp_path, form, out) == 1
        assert said in capfd.readouterr().err
    assert exported(tmp_path, "openai", tmp_path / "o.jsonl", "--agent", "suport") == 1
    assert "no episode of an agent 'suport'" in capfd.readouterr().err
    assert not (tmp_path / "o.jsonl").exists()
    assert exported(tmp_path, "trl", tmp_path / "o.jsonl") == 0
    assert "0 written: its rows are corrected steps, and there is none" in capfd.readouterr().out


def test_a_stream_is_given_the_rows_and_nothing_else(one_episode: Episode, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "learner", "export", "--format", "openai", "--out", "/dev/stdout"]
    ended = subprocess.run([*command, "--state", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert [json.loads(line)["messages"][-1]["content"] for line in ended.stdout.splitlines()] == ["a"]
    assert "1 written" in ended.stderr


def test_the_route_takes_a_time_without_a_zone_for_utc_as_the_command_does(
    serve_scripted: ServeScripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve_scripted("Hello.")
    server.client().chat.completions.create(model="novice", messages=[{"role": "user", "content": "Hi"}])
    an_hour_ago = datetime.fromtimestamp(time.time() - 3600, UTC).replace(tzinfo=None).isoformat()
    monkeypatch.setenv("TZ", "UTC+7")  # where it is earlier
    time.tzset()
    try:
        query = {"format": "openai", "since": an_hour_ago}
        assert len(httpx.get(f"{server.url}/v1/export", params=query).text.splitlines()) == 1
    finally:
        monkeypatch.undo()
        time.tzset()


def test_the_route_streams_a_row_a_line(serve_scripted: ServeScripted) -> None:
    server = serve_scripted("Hello.")
    server.client().chat.completions.create(model="novice", messages=[{"role": "user", "content": "Hi"}])
    answer = httpx.get(f"{server.url}/v1/export", params={"format": "openai"})
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    (row,) = [json.loads(line) for line in answer.text.splitlines()]
    assert row["messages"][-1] == {"role": "assistant", "content": "Hello."}
    later = httpx.get(f"{server.url}/v1/export", params={"format": "atif", "since": "2999-01-01T00:00:00Z"})
    assert (later.status_code, later.text) == (200, "")
    assert httpx.get(f"{server.url}/v1/export", params={"format": "csv"}).status_code == 400
