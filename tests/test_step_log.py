"""The step log's promises: token-exact, on disk when it says so, never edited, readable while it is written."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.types import (
    FinalAnswer,
    FinishReason,
    MalformedAction,
    SamplingParams,
    ToolCall,
    ToolCalls,
)
from runtime.store import step_log
from runtime.store.episodes import (
    Actor,
    Correction,
    Episode,
    Outcome,
    Purpose,
    Step,
    StopReason,
    ToolResult,
    new_id,
)
from runtime.store.prompt_chains import SequenceCache, common_prefix_len
from runtime.store.step_log import Mark, StepLog, StepLogError, Whose
from tests.records import make_chain, make_episode, make_step

ROOT = Path(__file__).parent.parent

EVERYWHERE = Whose(is_anybodys=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.db"


@pytest.fixture
def log(path: Path) -> Iterator[StepLog]:
    with closing(StepLog(path)) as log:
        yield log


# ----------------------------------------------------------------------------------------- what is logged reads back

TEXTS = st.text(st.characters(), max_size=6)  # with NUL, emoji, and halves of surrogate pairs
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(TEXTS, JSON, max_size=3)
NAMES = st.text(max_size=6)
TOKENS = st.lists(st.integers(0, 3) | st.integers(0, 2**31 - 1), max_size=8).map(tuple)
ACTIONS = st.one_of(
    st.builds(FinalAnswer, TEXTS, TEXTS),
    st.builds(MalformedAction, TEXTS, TEXTS),
    st.builds(
        ToolCalls, st.lists(st.builds(ToolCall, TEXTS, TEXTS, OBJECTS), min_size=1, max_size=3).map(tuple), TEXTS
    ),
)
SAMPLINGS = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    seed=st.none() | st.integers(-(2**70), 2**70),
    stop_token_ids=TOKENS,
    grammar=st.none() | TEXTS,
)
RESULTS = st.lists(st.builds(ToolResult, TEXTS, TEXTS, TEXTS, st.booleans(), st.floats(0, 1e6)), max_size=2).map(tuple)


@st.composite
def step_trees(draw: st.DrawFn) -> tuple[Episode, list[Step]]:
    """An episode whose steps extend, branch from, and rewrite what was before."""
    episode = make_episode(task=draw(st.none() | NAMES), metadata=draw(OBJECTS))
    steps: list[Step] = []
    for _ in range(draw(st.integers(1, 8))):
        parent = draw(st.none() | st.sampled_from(steps)) if steps else None
        seen = parent.prompt_token_ids + parent.completion_token_ids if parent else ()
        kept = seen[: draw(st.just(len(seen)) | st.integers(0, len(seen)))]  # extended, or rewritten from there on
        completion = draw(TOKENS)
        logprobs = st.lists(st.floats(max_value=0, width=32), min_size=len(completion), max_size=len(completion))
        step = make_step(
            episode,
            parent,
            new_messages=tuple(draw(st.lists(OBJECTS, max_size=3))),
            tools=tuple(draw(st.lists(OBJECTS, max_size=1))),
            prompt_token_ids=kept + draw(TOKENS),
            completion_token_ids=completion,
            behavior_logprobs=draw(st.none() | logprobs.map(tuple)),
            sampling=draw(SAMPLINGS),
            action=draw(ACTIONS),
            finish_reason=draw(st.sampled_from(FinishReason)),
            stop_reason=draw(st.none() | st.sampled_from(StopReason)),
            tool_results=draw(RESULTS),
            conversation_digest=draw(NAMES),
            created_at=draw(st.floats(0, 1e10)),
        )
        steps.append(step)
    return episode, steps


def ancestry(step: Step, steps: list[Step]) -> list[Step]:
    by_id = {step.id: step for step in steps}
    path = [step]
    while path[0].parent_id is not None:
        path.insert(0, by_id[path[0].parent_id])
    return path


def assert_reads_back(log: StepLog, episode: Episode, steps: list[Step]) -> None:
    assert log.episode(episode.id) == episode
    for step in reversed(steps):
        assert log.step(step.id) == step
        assert log.path_to(step.id) == ancestry(step, steps)
        assert log.children(step.id) == sorted(
            (other for other in steps if other.parent_id == step.id), key=lambda other: (other.created_at, other.id)
        )
        if not step.conversation_digest.isprintable():  # a digest is hex; SQLite's JSON ends a text at its first NUL
            continue
        same = [other for other in steps if other.conversation_digest == step.conversation_digest]
        found = log.marked_steps(Mark.CONVERSATION, [step.conversation_digest], EVERYWHERE)
        newest_first = sorted(same, key=lambda other: (other.created_at, other.id), reverse=True)
        assert [each.step_id for each in found] == [other.id for other in newest_first]
    assert log.steps(episode.id) == sorted(steps, key=lambda step: (step.created_at, step.id))


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(tree=step_trees(), is_one_append=st.booleans())
def test_every_step_reads_back_as_it_was_served(
    tmp_path_factory: pytest.TempPathFactory, tree: tuple[Episode, list[Step]], is_one_append: bool
) -> None:
    path = tmp_path_factory.mktemp("log") / "agent.db"
    episode, steps = tree
    with closing(StepLog(path)) as log:
        if is_one_append:
            log.append(episode, *steps).result()
        else:
            for fact in (episode, *steps):
                log.append(fact).result()
        assert_reads_back(log, episode, steps)
    for read_only in (False, True):  # with nothing cached
        with closing(StepLog(path, read_only=read_only)) as log:
            assert_reads_back(log, episode, steps)
            assert log.verify() == []


def test_logprobs_come_back_within_float32(log: StepLog) -> None:
    logprobs = (-1 / 3, -1e-9, -123.456789, 0.0, -math.inf)
    episode = make_episode()
    step = make_step(episode, completion_token_ids=(1,) * len(logprobs), behavior_logprobs=logprobs)
    log.append(episode, step).result()
    read = log.step(step.id)
    assert read is not None
    assert read.behavior_logprobs == pytest.approx(logprobs, rel=2**-23)


def test_outcomes_and_corrections_read_back_oldest_first(log: StepLog) -> None:
    episode = make_episode()
    step = make_step(episode)
    outcomes = [Outcome(new_id("out"), episode.id, value, "user", "päivää") for value in (0.0, 0.5, 1.0)]
    corrections = [Correction(new_id("cor"), step.id, FinalAnswer(text), (1, 2, 3), "expert") for text in ("a", "b")]
    log.append(episode, step, *outcomes, *corrections).result()
    assert log.outcomes(episode.id) == outcomes
    assert log.corrections(step.id) == corrections
    assert log.counts() == {
        "episodes": 1, "steps": 1, "outcomes": 3, "corrections": 2, "tool_sets": 1, "withdrawals": 0,
        "step_candidates": 0,
    }  # fmt: skip


def test_unknown_ids_read_as_nothing(log: StepLog) -> None:
    assert log.episode("?") is None
    assert log.step("?") is None
    assert log.marked_steps(Mark.CONVERSATION, ["?"], EVERYWHERE) == []
    assert log.response("?") is None
    assert log.run_from("?") == []
    assert log.steps("?") == log.path_to("?") == log.outcomes("?") == log.corrections("?") == []
    assert set(log.counts().values()) == {0}


# --------------------------------------------------------------------------------------------------- linear growth


def test_an_episodes_log_grows_linearly_with_its_length(path: Path, log: StepLog) -> None:
    episode = make_episode()
    steps = make_chain(episode, 300)
    log.append(episode, *steps).result()
    with closing(sqlite3.connect(path)) as connection:
        stored = connection.execute(
            "SELECT length(prompt_suffix) + length(completion_token_ids) + length(new_messages) + length(action)"
            " FROM steps ORDER BY step_index"
        ).fetchall()
    assert len(set(stored[1:])) == 1  # the last step costs what the second did
    assert len(steps[-1].prompt_token_ids) == 299 * 5 + 3


def test_rebuilding_a_cold_chain_reads_each_ancestor_once(path: Path, log: StepLog) -> None:
    episode = make_episode()
    steps = make_chain(episode, 200)
    log.append(episode, *steps).result()
    with closing(StepLog(path, read_only=True)) as cold:
        queries: list[str] = []
        with cold._reading() as connection:
            connection.set_trace_callback(queries.append)
        assert cold.step(steps[-1].id) == steps[-1]
        assert len(queries) == 1 + 199
        queries.clear()
        assert cold.step(steps[-1].id) == steps[-1]
        assert len(queries) == 1


def test_the_cache_holds_no_more_than_its_bytes() -> None:
    cache = SequenceCache(max_bytes=100)
    for number in range(10):
        cache.put(f"step {number}", bytes(40))
        cache.get("step 0")  # the one that is used stays
    assert [number for number in range(10) if cache.get(f"step {number}") is not None] == [0, 9]
    cache.put("too big", bytes(101))
    assert cache.get("too big") is None


@given(left=TOKENS, right=TOKENS, shared=TOKENS)
def test_the_common_prefix_is_the_longest(
    left: tuple[int, ...], right: tuple[int, ...], shared: tuple[int, ...]
) -> None:
    left, right = shared + left, shared + right
    expected = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
    blobs = (b"".join(token.to_bytes(4, "little") for token in tokens) for tokens in (left, right))
    assert common_prefix_len(*blobs) == expected


# ------------------------------------------------------------------------------------------------- group commits


def test_appends_from_many_threads_are_all_there_and_bad_callers_hurt_only_themselves(log: StepLog) -> None:
    episode = make_episode()
    log.append(episode).result()
    logged: list[Step] = []
    refused: list[Step] = []

    def append_some(number: int) -> None:
        parent = None
        for turn in range(20):
            if (number + turn) % 4 == 0:
                bad = make_step(make_episode())  # its episode was never logged
                with pytest.raises(StepLogError, match="not in the log"):
                    log.append(bad).result()
                refused.append(bad)
            parent = make_step(episode, parent)
            log.append(parent).result()
            logged.append(parent)

    threads = [threading.Thread(target=append_some, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(logged) == 16 * 20
    assert len(refused) == 16 * 5
    assert {step.id: step for step in log.steps(episode.id)} == {step.id: step for step in logged}
    assert all(log.step(step.id) is None for step in refused)
    assert log.verify() == []


def test_all_that_waits_is_committed_at_once(path: Path, log: StepLog) -> None:
    assert log._writer is not None
    statements: list[str] = []
    log._writer.connection.set_trace_callback(statements.append)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # the writer waits for this
        futures = [log.append(make_episode()) for _ in range(50)]
        other.execute("ROLLBACK")
    for future in futures:
        future.result(timeout=30)
    assert statements.count("COMMIT") <= 2  # the first append alone, at most; then all the others
    assert log.counts()["episodes"] == 50


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda step: replace(step, episode_id="nowhere"), "episode nowhere, which is not in the log"),
        (lambda step: replace(step, parent_id="nobody", index=1), "parent nobody is not in the log"),
        (lambda step: replace(step, completion_token_ids=(2**31, 1)), "cannot be logged"),
        (lambda step: replace(step, new_messages=({"n": math.nan},)), "not JSON compliant"),
        (lambda step: replace(step, new_messages=({"n": object()},)), "not JSON serializable"),
        (lambda step: replace(step, action="text"), "an action is"),
        (lambda step: replace(step, adapter="\ud800"), "cannot be logged"),
        (lambda step: replace(step, finish_reason="tired"), "tired"),
        (lambda step: "step", "a fact is"),
    ],
)
def test_what_cannot_be_logged_is_refused_whole_and_with_a_reason(log: StepLog, spoil: Any, sentence: str) -> None:
    episode = make_episode()
    step = make_step(episode)
    good, bad, also_good = (
        log.append(make_episode()),
        log.append(episode, step, spoil(make_step(episode, step))),
        log.append(make_episode()),
    )
    with pytest.raises(StepLogError, match=sentence):
        bad.result(timeout=30)
    good.result(timeout=30)
    also_good.result(timeout=30)
    assert log.step(step.id) is None
    assert log.counts()["episodes"] == 2
    log.append(episode, step).result()
    assert log.step(step.id) == step


def test_a_second_fact_of_the_same_id_is_refused_and_the_first_stays(log: StepLog) -> None:
    episode = make_episode()
    step = make_step(episode)
    log.append(episode, step).result()
    with pytest.raises(StepLogError, match="never replaced"):
        log.append(replace(step, prompt_token_ids=(1, 2), action=FinalAnswer("other"))).result()
    child = make_step(episode, step)
    log.append(child).result()
    assert log.path_to(child.id) == [step, child]


def test_a_refused_step_leaves_no_tokens_behind(path: Path, log: StepLog) -> None:
    """The cache is filled before the commit. What was refused must not be what a later step of that id is built on."""
    episode = make_episode()
    step = make_step(episode)
    log.append(episode).result()
    with pytest.raises(StepLogError):
        log.append(replace(step, prompt_token_ids=(1, 1, 1, 1)), make_step(make_episode())).result()
    child = make_step(episode, step)
    with pytest.raises(StepLogError, match=f"parent {step.id} is not in the log"):
        log.append(child).result()
    log.append(step).result()
    log.append(child).result()
    assert log.path_to(child.id) == [step, child]
    with closing(StepLog(path, read_only=True)) as cold:
        assert cold.path_to(child.id) == [step, child]


async def test_a_cancelled_wait_does_not_take_facts_back(log: StepLog) -> None:
    """A client that hangs up cancels the task which waits for the log. Its step was served all the same."""
    episodes = [make_episode() for _ in range(20)]
    for episode in episodes:
        asyncio.wrap_future(log.append(episode)).cancel()
    await asyncio.wrap_future(log.append(make_episode()))
    assert all(log.episode(episode.id) == episode for episode in episodes)


def test_close_writes_what_waits(path: Path) -> None:
    log = StepLog(path)
    futures = [log.append(make_episode()) for _ in range(200)]
    log.close()
    log.close()
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(StepLogError, match="closed"):
        log.append(make_episode())
    with pytest.raises(StepLogError, match="closed"):
        log.counts()
    with closing(StepLog(path)) as again:
        assert again.counts()["episodes"] == 200


# ------------------------------------------------------------------------------------------- when the disk says no


def test_a_full_disk_is_an_error_and_later_writes_go_on(log: StepLog) -> None:
    assert log._writer is not None
    connection = log._writer.connection
    episode = make_episode()
    step = make_step(episode)
    log.append(episode).result()
    (num_pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {num_pages + 2}")
    with pytest.raises(StepLogError, match="disk is full"):
        log.append(make_episode(metadata={"much": "x" * 100_000})).result()
    with pytest.raises(StepLogError, match="disk is full"):
        log.append(step, make_episode(metadata={"much": "x" * 100_000})).result()
    connection.execute("PRAGMA max_page_count = 1000000")
    with pytest.raises(StepLogError, match=f"parent {step.id} is not in the log"):
        log.append(make_step(episode, step)).result()
    log.append(step).result()
    assert log.step(step.id) == step
    assert log.counts()["episodes"] == 1
    assert log.verify() == []


WRITE_TO_A_LIMIT = """
import os, resource, sys
from runtime.store.step_log import StepLog, StepLogError
from tests.records import make_chain, make_episode
log = StepLog(sys.argv[1])
episode = make_episode()
steps = make_chain(episode, 60)
log.append(episode).result()
no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
limit = os.path.getsize(sys.argv[1] + "-wal") + 150_000
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, no_limit[1]))
logged = 0
try:
    for step in steps:
        log.append(step).result()
        logged += 1
except StepLogError as error:
    print(error)
assert 0 < logged < 60, logged
resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
for step in steps[logged:]:
    log.append(step).result()
assert log.steps(episode.id) == steps
assert log.verify() == []
log.close()
print("went on")
"""


def test_an_operating_system_that_refuses_to_write_is_an_error_and_later_writes_go_on(path: Path) -> None:
    """A real limit on the size of files: write() itself fails in the middle of a commit."""
    run = subprocess.run(
        [sys.executable, "-c", WRITE_TO_A_LIMIT, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    problem, last_line = run.stdout.splitlines()
    assert "these facts were not logged" in problem
    assert last_line == "went on"


def test_a_write_lock_that_is_held_too_long_is_an_error_and_later_writes_go_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_log, "LOCK_TIMEOUT_S", 0.1)
    with closing(StepLog(path)) as log:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StepLogError, match="write lock"):
                log.append(make_episode()).result()
            other.execute("ROLLBACK")
        log.append(make_episode()).result()
        assert log.counts()["episodes"] == 1


# ------------------------------------------------------------------------------------------------------- kill -9

APPEND_UNTIL_KILLED = """
import sys, threading
from runtime.store.step_log import StepLog
from tests.records import make_episode, make_step
log = StepLog(sys.argv[1])
def append_for_ever():
    while True:
        episode, step = make_episode(), None
        facts = [episode]
        for _ in range(10):
            step = make_step(episode, step)
            log.append(*facts, step).result()
            facts = []
            sys.stdout.write(f"{step.id} {len(step.prompt_token_ids)}\\n")
            sys.stdout.flush()
for _ in range(4):
    threading.Thread(target=append_for_ever).start()
"""


@pytest.mark.slow
def test_kill_minus_nine_loses_nothing_that_was_reported_done(path: Path) -> None:
    reported: dict[str, int] = {}
    for delay_s in [random.uniform(0.0, 0.4) for _ in range(5)]:
        command = [sys.executable, "-c", APPEND_UNTIL_KILLED, str(path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline()]
            time.sleep(delay_s)
            with closing(StepLog(path, read_only=True)) as reader:  # another process, while it writes
                assert reader.step(lines[0].split()[0]) is not None
                assert all(reader.path_to(step.id)[-1] == step for step in reader.steps_since(None, 20))
            writer.send_signal(signal.SIGKILL)
            lines += writer.stdout.readlines()
        whole = [line.split() for line in lines if line.endswith("\n")]
        reported |= {step_id: int(num_prompt_tokens) for step_id, num_prompt_tokens in whole}
        with closing(StepLog(path)) as log:
            assert log.verify() == []
            for step_id, num_prompt_tokens in reported.items():
                step = log.step(step_id)
                assert step is not None
                assert len(step.prompt_token_ids) == num_prompt_tokens
    assert len(reported) > 50


# ------------------------------------------------------------------------------------------ reading while writing


def test_a_read_only_log_reads_while_another_writes(path: Path, log: StepLog) -> None:
    episode = make_episode()
    steps = make_chain(episode, 100)
    log.append(episode).result()

    def append_all() -> None:
        for step in steps:
            log.append(step).result()

    with closing(StepLog(path, read_only=True)) as reader:
        writing = threading.Thread(target=append_all)
        writing.start()
        seen: list[Step] = []
        while len(seen) < len(steps):
            seen += reader.steps_since(seen[-1].id if seen else None, 7)
        writing.join()
        assert seen == steps
        with pytest.raises(StepLogError, match="read only"):
            reader.append(make_episode())


def test_reading_from_many_threads_at_once(path: Path, log: StepLog) -> None:
    episode = make_episode()
    steps = make_chain(episode, 30)
    log.append(episode, *steps).result()
    wrong: list[str] = []

    def read_often(number: int) -> None:
        for step in random.Random(number).choices(steps, k=60):
            if log.path_to(step.id) != steps[: step.index + 1]:
                wrong.append(step.id)

    threads = [threading.Thread(target=read_often, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_two_readers_never_share_a_connection(log: StepLog) -> None:
    log.counts()  # leaves an idle connection
    with log._reading() as one, log._reading() as other:
        assert one is not other


def test_a_file_that_is_no_step_log_of_ours_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(StepLogError, match="there is no step log"):
        StepLog(tmp_path / "missing.db", read_only=True)
    with pytest.raises(StepLogError, match="could not be opened"):
        StepLog(tmp_path / "no folder" / "agent.db")

    (tmp_path / "text.db").write_text("not a database, by far" * 100)
    for read_only in (False, True):
        with pytest.raises(StepLogError, match="not a database"):
            StepLog(tmp_path / "text.db", read_only=read_only)

    sqlite3.connect(tmp_path / "empty.db").close()
    with pytest.raises(StepLogError, match="older release"):
        StepLog(tmp_path / "empty.db", read_only=True)

    StepLog(tmp_path / "newer.db").close()
    with closing(sqlite3.connect(tmp_path / "newer.db")) as connection, connection:
        connection.execute("INSERT INTO _sqlite_migrations VALUES (99, 'step_log', 'of_tomorrow', '')")
    for read_only in (False, True):
        with pytest.raises(StepLogError, match="newer release"):
            StepLog(tmp_path / "newer.db", read_only=read_only)


# -------------------------------------------------------------------------------------------------------- paging


def test_paging_sees_each_episode_once_while_new_ones_arrive(log: StepLog) -> None:
    old = [make_episode() for _ in range(25)]
    log.append(*old).result()
    seen: list[Episode] = []
    while page := log.episodes(after=seen[-1].id if seen else None, limit=4):
        seen += page
        log.append(make_episode()).result()
    assert seen == old[::-1]


def test_episodes_are_filtered_by_what_they_are(log: StepLog) -> None:
    tasks = [None, "order_desk/train/1", "order_desk/train/12", "order%desk/train/1", "order_desk/test/1"]
    kinds = itertools.product(Actor, Purpose, ("base", "agent-v0001"), tasks)
    episodes = [make_episode(actor=a, purpose=p, adapter=n, task=t) for a, p, n, t in kinds]
    log.append(*episodes).result()
    newest_first = episodes[::-1]
    assert log.episodes(limit=1000) == newest_first
    assert log.episodes(limit=1000, actor=Actor.EXPERT) == [e for e in newest_first if e.actor == "expert"]
    assert log.episodes(limit=1000, purpose=Purpose.PRACTICE) == [e for e in newest_first if e.purpose == "practice"]
    assert log.episodes(limit=1000, adapter="agent-v0001") == [e for e in newest_first if e.adapter != "base"]
    for prefix in ("order_desk/train/", "order_desk/train/1", "order%", "order_"):
        expected = [e for e in newest_first if e.task and e.task.startswith(prefix)]
        assert log.episodes(limit=1000, task_prefix=prefix) == expected
    both = log.episodes(limit=1000, actor=Actor.EXPERT, adapter="base", task_prefix="order_desk/test")
    assert both == [e for e in newest_first if (e.actor, e.adapter, e.task) == ("expert", "base", tasks[4])]


def test_a_slow_step_logged_after_quicker_ones_is_not_passed_over(log: StepLog) -> None:
    episode = make_episode()
    slow, quick = make_step(episode), make_step(episode)
    assert slow.id < quick.id
    log.append(episode, quick).result()
    assert log.steps_since(None, 5) == [quick]
    log.append(slow).result()
    assert log.steps_since(quick.id, 5) == [slow]


def test_steps_since_hands_out_every_step_once(log: StepLog) -> None:
    episode = make_episode()
    steps = make_chain(episode, 23)
    log.append(episode, *steps).result()
    seen: list[Step] = []
    while page := log.steps_since(seen[-1].id if seen else None, 5):
        seen += page
    assert seen == steps


# -------------------------------------------------------------------------------------------------- never edited


@pytest.mark.parametrize("table", ["episodes", "steps", "outcomes", "corrections", "tool_sets"])
def test_facts_are_never_edited(path: Path, log: StepLog, table: str) -> None:
    episode = make_episode()
    step = make_step(episode)
    outcome = Outcome(new_id("out"), episode.id, 1.0, "user")
    log.append(episode, step, outcome, Correction(new_id("cor"), step.id, FinalAnswer("no"), (1,), "expert")).result()
    with closing(sqlite3.connect(path)) as connection:  # as any other program would open it
        before = connection.execute(f"SELECT * FROM {table}").fetchall()
        for edit in (
            f"UPDATE {table} SET rowid = rowid + 1",
            f"DELETE FROM {table}",
            f"INSERT OR REPLACE INTO {table} SELECT * FROM {table}",
        ):
            with pytest.raises(sqlite3.IntegrityError, match=f"{table} are facts"):
                connection.execute(edit)
        assert connection.execute(f"SELECT * FROM {table}").fetchall() == before


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("UPDATE steps SET prompt_suffix = zeroblob(length(prompt_suffix)) WHERE step_index = 1", "served"),
        ("UPDATE steps SET completion_token_ids = x'' WHERE step_index = 1", "served"),
        ("UPDATE steps SET prefix_len = prefix_len - 1 WHERE step_index = 2", "another length"),
        ("UPDATE steps SET action = '{}' WHERE step_index = 1", "is damaged: "),
        ("UPDATE steps SET step_index = 7 WHERE step_index = 2", "number of its ancestors"),
        ("UPDATE steps SET parent_id = 'nobody' WHERE step_index = 2", "not in steps"),
        ("UPDATE episodes SET actor = 'nobody'", "nobody"),
    ],
)
def test_verify_finds_what_was_damaged(path: Path, log: StepLog, damage: str, problem: str) -> None:
    episode = make_episode()
    log.append(episode, *make_chain(episode, 4)).result()
    assert log.verify() == []
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TRIGGER steps_refuse_update")
        connection.execute("DROP TRIGGER episodes_refuse_update")
        connection.execute(damage)
    assert any(problem in sentence for sentence in log.verify())


def test_verify_finds_a_damaged_file(path: Path) -> None:
    with closing(StepLog(path)) as log:
        episode = make_episode()
        log.append(episode, *make_chain(episode, 100)).result()
    with closing(sqlite3.connect(path)) as connection:
        (page_size,) = connection.execute("PRAGMA page_size").fetchone()
        root = "SELECT rootpage FROM sqlite_schema WHERE name = 'idx_steps_parent_id'"
        (page,) = connection.execute(root).fetchone()
    content = bytearray(path.read_bytes())
    content[(page - 1) * page_size : page * page_size] = bytes(page_size)
    path.write_bytes(content)
    with closing(StepLog(path, read_only=True)) as log:
        assert log.verify() != []


# --------------------------------------------------------------------------------------------------------- views


def log_a_talk(log: StepLog, actor: Actor = Actor.POLICY) -> tuple[Episode, list[Step]]:
    episode = make_episode(actor=actor, task="order_desk/train/3", adapter="agent-v0002")
    parts = [
        {"type": "text", "text": "A mug,"},
        {"type": "image_url", "image_url": {}},
        {"type": "text", "text": "please"},
    ]
    arguments = {"item": 'mug "blue"', "count": 2, "gift": True, "note": None, "tags": ["a", 1]}
    first = make_step(
        episode,
        new_messages=({"role": "system", "content": None}, {"role": "user", "content": parts}),
        action=ToolCalls((ToolCall("c1", "pick", arguments), ToolCall("c2", "look", {})), "On it.", "Picking first."),
        completion_token_ids=(1, 2),
        behavior_logprobs=(-1.0, -2.0),
        tool_results=(ToolResult("c1", "pick", "picked"), ToolResult("c2", "look", "too dark", is_error=True)),
        stop_reason=None,
    )
    asked_again = {"id": "c3", "type": "function", "function": {"name": "ask", "arguments": '{"whom":"Ada"}'}}
    second = make_step(
        episode,
        first,
        new_messages=(
            {"role": "tool", "tool_call_id": "c1", "content": "picked"},
            {"role": "tool", "tool_call_id": "c2", "content": "too dark"},
            {"role": "assistant", "content": None, "tool_calls": [asked_again]},
            {"role": "tool", "tool_call_id": "c3", "content": "Näkemiin 👋"},
        ),
        action=MalformedAction("pick(", "it ends in the middle"),
        behavior_logprobs=None,
        stop_reason=StopReason.MALFORMED,
    )
    bad = Outcome(new_id("out"), episode.id, 0.0, "user")
    good = Outcome(new_id("out"), episode.id, 1.0, "world", "shipped")
    log.append(episode, first, second, bad, good).result()
    return episode, [first, second]


@pytest.mark.parametrize(("actor", "speaker"), [(Actor.POLICY, "agent"), (Actor.EXPERT, "expert")])
def test_an_episode_reads_like_a_transcript(path: Path, log: StepLog, actor: Actor, speaker: str) -> None:
    log.append(make_episode()).result()
    episode, _ = log_a_talk(log, actor)
    log_a_talk(log)
    with closing(sqlite3.connect(path)) as connection:
        lines = connection.execute("SELECT * FROM episode_text WHERE episode_id = ?", (episode.id,)).fetchall()
        everything = connection.execute("SELECT * FROM episode_text").fetchall()
    assert {line[:3] for line in lines} == {(episode.id, "order_desk/train/3", "agent-v0002")}
    assert [line[3:] for line in lines] == [
        (0, "user", "A mug, [image_url] please"),
        (0, speaker, "(thinks) Picking first."),
        (0, speaker, "On it."),
        (0, speaker, r'pick(item="mug \"blue\"", count=2, gift=true, note=null, tags=["a",1])'),
        (0, speaker, "look()"),
        (0, "tool", "picked"),
        (0, "tool", "(error) too dark"),
        (1, "assistant", 'ask(whom="Ada")'),
        (1, "tool", "Näkemiin 👋"),
        (1, speaker, "pick("),
        (1, speaker, "(malformed) it ends in the middle"),
        (None, "outcome", "1.0 (world) shipped"),
    ]
    assert everything[: len(lines)] == lines
    assert len(everything) == 2 * len(lines)


def test_a_summary_has_one_row_a_step(path: Path, log: StepLog) -> None:
    episode, (first, second) = log_a_talk(log)
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        rows = [dict(row) for row in connection.execute("SELECT * FROM step_summary")]
    assert rows == [
        {
            "step_id": first.id,
            "episode_id": episode.id,
            "parent_id": None,
            "step_index": 0,
            "adapter": "base",
            "action_type": "tool_calls",
            "tool_names": "pick, look",
            "num_prompt_tokens": 3,
            "num_completion_tokens": 2,
            "finish_reason": "stop",
            "stop_reason": None,
            "first_token_ms": 1.0,
            "latency_ms": 2.0,
            "mean_logprob": -1.5,
            "created_at": first.created_at,
        },
        {
            "step_id": second.id,
            "episode_id": episode.id,
            "parent_id": first.id,
            "step_index": 1,
            "adapter": "base",
            "action_type": "malformed_action",
            "tool_names": None,
            "num_prompt_tokens": 8,
            "num_completion_tokens": 2,
            "finish_reason": "stop",
            "stop_reason": "malformed",
            "first_token_ms": 1.0,
            "latency_ms": 2.0,
            "mean_logprob": None,
            "created_at": second.created_at,
        },
    ]


NO_JSON = ("", "{", "\x00", "[1", "nul")
OTHER_JSON = (
    "null",
    "7",
    '"text"',
    "[]",
    '["{", 3, null, [[]]]',
    '{"calls": "pick", "type": []}',
    '[{"content": ["x"]}]',
)


@pytest.mark.parametrize("column", ["action", "new_messages", "tool_results"])
@pytest.mark.parametrize("value", NO_JSON + OTHER_JSON, ids=lambda value: value[:12])
def test_a_row_that_cannot_be_read_costs_the_views_its_own_lines_alone(
    path: Path, log: StepLog, column: str, value: str
) -> None:
    """One byte of one row made every query of the views fail."""
    _, (damaged, _) = log_a_talk(log)
    whole, _ = log_a_talk(log)
    with closing(sqlite3.connect(path)) as connection:
        of_whole = "SELECT * FROM episode_text WHERE episode_id = ?"
        before = connection.execute(of_whole, (whole.id,)).fetchall()
        connection.execute("DROP TRIGGER steps_refuse_update")
        connection.execute(f"UPDATE steps SET {column} = ? WHERE id = ?", (value, damaged.id))
        assert len(connection.execute("SELECT * FROM step_summary").fetchall()) == 4
        lines = connection.execute("SELECT * FROM episode_text").fetchall()
        assert [line for line in lines if line[0] == whole.id] == before
    told = [line for line in lines if line[0] == damaged.episode_id and line[4] == "log"]
    assert len(told) == (value in NO_JSON)


def test_a_call_whose_id_has_no_utf8_is_logged_and_the_one_beside_it_found(log: StepLog) -> None:
    """Such an id refused the whole step."""
    calls = ToolCall("call_\ud800", "look", {}), ToolCall("call_1", "look", {})
    episode = make_episode()
    step = make_step(episode, action=ToolCalls(calls))
    log.append(episode, step).result()
    assert log.step(step.id) == step
    assert [each.step_id for each in log.marked_steps(Mark.CALL, [call.id for call in calls], EVERYWHERE)] == [step.id]


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(tree=step_trees())
def test_views_can_be_read_whatever_was_logged(
    tmp_path_factory: pytest.TempPathFactory, tree: tuple[Episode, list[Step]]
) -> None:
    path = tmp_path_factory.mktemp("views") / "agent.db"
    with closing(StepLog(path)) as log, closing(sqlite3.connect(path)) as connection:
        log.append(tree[0], *tree[1]).result()
        connection.text_factory = bytes  # half of a surrogate pair has no UTF-8
        assert len(connection.execute("SELECT * FROM step_summary").fetchall()) == len(tree[1])
        connection.execute("SELECT * FROM episode_text").fetchall()
