"""python -m learner, as it is typed: imports tell what they refuse, and every error is a sentence and an exit code."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from learner.__main__ import main
from learner.commands.once import OnceOptions
from learner.commands.server import ServerOptions
from learner.report import NOT_ASKED
from runtime.store.learning_log import CycleStage, LearningLog, LearningReader
from runtime.store.step_log import StepLog
from tests.conftest import ServeScripted
from tests.demonstrations import expert_demonstration
from tests.serving import wait_until


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def demonstration(index: int) -> dict[str, object]:
    made = expert_demonstration(index)
    return {"messages": made["messages"], "tools": made["tools"]}


def test_an_import_takes_what_it_can_and_tells_the_rest_by_line(
    serve_scripted: ServeScripted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server = serve_scripted()
    elsewhere = {
        "tools": demonstration(1)["tools"],
        "messages": [
            {"role": "user", "content": "Please see to order 1000."},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "open_browser", "arguments": '{"url": "x"}'}}
                ],
            },
        ],
    }
    path = jsonl(tmp_path / "desk.jsonl", demonstration(1), {"messages": []}, elsewhere, demonstration(2))
    url = ["--url", f"{server.url}/v1"]
    assert main(["import", str(path), *url]) == 1
    said = capfd.readouterr().out
    assert f"{path}: 2 imported, 0 known already, 2 refused" in said
    assert f"{path} line 2: " in said
    assert f"{path} line 3: " in said  # it calls what is not among its tools
    assert main(["import", str(jsonl(tmp_path / "again.jsonl", demonstration(1))), *url]) == 0
    assert "0 imported, 1 known already, 0 refused" in capfd.readouterr().out


def test_an_import_says_where_calls_are_learned_and_no_tools_are_named(
    serve_scripted: ServeScripted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server, untold = serve_scripted(), demonstration(1)
    del untold["tools"]
    path = jsonl(tmp_path / "untold.jsonl", untold, demonstration(2))
    assert main(["import", str(path), "--url", f"{server.url}/v1"]) == 0
    assert f"{path}: 1 call tools and do not say which were on offer" in capfd.readouterr().out
    assert main(["import", "--dry-run", str(path)]) == 0
    assert re.search(r"records that call tools and name none on offer +1\n", capfd.readouterr().out)


def test_a_run_that_comes_as_one_record_for_each_call_is_one_demonstration(
    serve_scripted: ServeScripted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server, whole = serve_scripted(), expert_demonstration(1)
    said = [index for index, message in enumerate(whole["messages"]) if message["role"] == "assistant"]
    calls = [{"messages": whole["messages"][: index + 1], "tools": whole["tools"]} for index in said]
    path = jsonl(tmp_path / "trace.jsonl", *calls)
    assert main(["import", str(path), "--url", f"{server.url}/v1", "--state", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    assert f"{len(said)} imported" in printed
    assert f"with 1 demonstration of {len(said)} states" in printed


ESCAPE = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e"


def test_what_a_file_holds_cannot_speak_to_the_terminal(
    serve_scripted: ServeScripted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A demonstration's words, and the key of a record that is refused, were printed as they are: files come from
    others."""
    server, said = serve_scripted(), [{"role": "user", "content": f"Hi{ESCAPE}"}, {"role": "assistant", "content": "a"}]
    path = jsonl(tmp_path / "theirs.jsonl", {"messages": said}, {"messages": said, f"key{ESCAPE}": 1})
    assert main(["import", "--dry-run", str(path)]) == 1
    assert main(["import", str(path), "--url", f"{server.url}/v1", "--state", str(tmp_path)]) == 1
    printed = capfd.readouterr().out
    assert "Hi\\x1b]0;title" in printed
    assert "--ignore key\\x1b]0;title" in printed
    assert not set(ESCAPE) & set(printed) - set("0;title[2J31m]")


def test_an_import_says_what_the_gate_could_show_and_how_many_more_would_help(
    serve_scripted: ServeScripted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server = serve_scripted()
    path = jsonl(tmp_path / "desk.jsonl", *(demonstration(number) for number in range(3)))
    options = ["--url", f"{server.url}/v1", "--state", str(tmp_path)]
    assert main(["import", str(path), *options]) == 0
    said = capfd.readouterr().out
    num_states = server.parts.log.counts()["steps"]
    assert f"where no world's tasks judge, with 3 demonstrations of {num_states} states no gain can be shown" in said
    assert "more demonstrations would show 30" in said
    more = jsonl(tmp_path / "more.jsonl", *(demonstration(number) for number in range(3, 12)))
    assert main(["import", str(more), *options]) == 0
    assert "points or more can be shown" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", ": the file is empty"), (b'{"messages": [', "line 1: "), (b"\xff\xfe\x00nonsense", ": the file is UTF-16")],
)
def test_a_file_that_is_none_is_told_and_nothing_is_logged(
    serve_scripted: ServeScripted, tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, words: str
) -> None:
    server = serve_scripted()
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    assert main(["import", str(path), "--url", f"{server.url}/v1"]) == 1
    assert words in capfd.readouterr().out
    assert server.parts.log.counts()["episodes"] == 0


def test_many_demonstrations_are_sent_in_bodies_that_the_server_takes(
    serve_scripted: ServeScripted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server = serve_scripted()
    records = [demonstration(index) for index in range(70)]
    for record in records[:10]:
        record["messages"] = [{"role": "system", "content": "so " * 200_000}, *record["messages"]]  # type: ignore[misc]
    path = jsonl(tmp_path / "large.jsonl", *records)
    assert main(["import", str(path), "--url", f"{server.url}/v1"]) == 1
    said = capfd.readouterr().out
    assert "60 imported, 0 known already, 10 refused" in said
    assert "the model's context holds" in said


def test_without_a_server_or_a_log_each_command_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    nowhere = ["--url", "http://127.0.0.1:9/v1", "--state", str(tmp_path)]
    path = jsonl(tmp_path / "desk.jsonl", demonstration(1))
    for command, words in (
        (["status"], "start the server first"),
        (["once"], "start the server first"),
        (["rollback"], "did not do it"),
        (["import", str(path)], "did not do it"),
    ):
        assert main([*command, *nowhere]) == 1, command
        assert words in capfd.readouterr().err


def test_a_rollback_with_nothing_behind_is_told(
    serve_scripted: ServeScripted, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["rollback", "--url", f"{serve_scripted().url}/v1"]) == 1
    assert "nothing to roll back to" in capfd.readouterr().err


@pytest.mark.parametrize("world", ["", "order_desk"])
def test_a_cycle_by_hand_is_judged_in_the_world_that_is_served(
    serve_scripted: ServeScripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: str
) -> None:
    """Against a server of no world, a cycle was judged by tasks of the order desk."""
    server = serve_scripted(worlds={"": world})
    found: list[str | None] = []

    async def judged(options: OnceOptions) -> str:
        found.append(options.world)
        return "refused"

    monkeypatch.setattr("learner.commands.once._clear_up_and_run", judged)
    where = ["once", "--url", f"{server.url}/v1", "--state", str(tmp_path)]
    assert main(where) == 0
    assert main([*where, "--world", "chess"]) == 0
    assert found == [world, "chess"]


def test_a_cycle_by_hand_says_where_no_server_answers(
    serve_scripted: ServeScripted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    serve_scripted()
    assert main(["once", "--url", "http://127.0.0.1:9/v1", "--state", str(tmp_path)]) == 1
    assert "http://127.0.0.1:9/v1 did not do it" in capfd.readouterr().err


BOUNDS = {
    "held-out-share": (0, 1), "max-demonstrations": (1, None), "max-own-episodes": (0, None), "replay-share": (0, 1),
    "max-versions-old": (0, None), "anchor-share": (0, 1), "max-anchors": (0, None), "anchor-weight": (0, None),
    "kl-weight": (0, None), "clip-low": (0, 1), "clip-high": (0, None), "epochs": (0, None),
    "min-gradient-steps": (0, None), "trajectories-per-step": (1, None), "rank": (1, None), "token-budget": (1, None),
    "seed": (0, None), "num-samples": (0, None), "gate-tasks": (0, None), "canary-share": (0, 1), "threads": (1, None),
}  # fmt: skip
ABOVE_ZERO = ("beta", "lr", "max-grad-norm", "max-success-length")


@pytest.mark.parametrize("name", [*BOUNDS, *ABOVE_ZERO])
def test_a_cycle_is_refused_before_it_begins_where_an_option_is_out_of_its_bounds(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Most of them failed only after the inspection, or meant something else than they said."""

    def said(value: float) -> str:
        with contextlib.suppress(SystemExit):
            assert main(["once", "--state", str(tmp_path), f"--{name}={value}"]) == 1
        return capfd.readouterr().err

    option = f"{name.replace('-', '_')}: Input should be "
    if name in ABOVE_ZERO:
        assert option + "greater than 0" in said(0)
        assert option in said(math.inf)
        assert "start the server first" in said(0.01)
    else:
        low, high = BOUNDS[name]
        assert option + f"greater than or equal to {low}" in said(low - 1)
        assert "start the server first" in said(low)
        if high is not None:
            assert option + f"less than or equal to {high}" in said(high + 1)
            assert "start the server first" in said(high)
    assert option in said(math.nan)


def test_every_number_of_a_cycle_has_bounds() -> None:
    numbers = {
        name.replace("_", "-")
        for name, field in OnceOptions.model_fields.items()
        if re.search(r"\b(int|float)\b", str(field.annotation))
        and name not in (*ServerOptions.model_fields, "server_pid")
    }
    assert numbers == {*BOUNDS, *ABOVE_ZERO}


def test_a_second_learner_waits_for_the_first(
    serve_scripted: ServeScripted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server = serve_scripted()
    with (tmp_path / "learner.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["once", "--url", f"{server.url}/v1", "--state", str(tmp_path)]) == 3
    assert "another cycle runs" in capfd.readouterr().err


def test_a_cycle_that_cannot_be_logged_ends_with_a_sentence(
    serve_scripted: ServeScripted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a full disk it was a traceback. Here nothing may write, since its file's size is bounded."""
    server = serve_scripted()
    command = [sys.executable, "-m", "learner", "once", "--url", f"{server.url}/v1", "--state", str(tmp_path)]
    LearningLog(tmp_path).close()
    ended = subprocess.run(
        ["bash", "-c", "ulimit -f 0; trap '' XFSZ; \"$@\" 2>&1 | cat", "bash", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"the cycle cannot be logged in {tmp_path / 'agent.db'}" in ended.stdout
    assert "Traceback" not in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["import"], "FILES"),
        (["once", "--expert-url", "http://127.0.0.1:9/v1"], "go together"),
        (["fly"], "no command is called 'fly'"),
        (["once", "--epochs", "abc"], "epochs: Input should be a valid integer"),
        (["once", "--epochs", "0", "--min-gradient-steps", "0"], "epochs and min_gradient_steps are both 0"),
        (["once", "--objectives="], "objectives: name one objective at least"),
        (["once", "--objectives", "sft,sft"], "objectives: name one objective at least, and none twice"),
        (
            ["once", "--objectives", "sft,telepathy"],
            "objectives: no objective is called 'telepathy'; there are: sft_rft",
        ),
        (["status", "--url", "localhost:8000"], "url: 'localhost:8000' is no address of a server, such as http://"),
        (["rollback", "--url", ""], "url: '' is no address of a server"),
        (["once", "--device", "banana"], "device: 'banana' is no device: auto, cpu, cuda, or cuda:1"),
        (["once", "--device", "cuda:"], "device: 'cuda:' is no device"),
        (["once", "--seed", str(2**31 + 1)], "seed: Input should be less than or equal to 2147483648"),
    ],
)
def test_options_that_make_no_sense_end_with_a_sentence(
    arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert words in capfd.readouterr().err


def test_the_status_lists_cycles(
    serve_scripted: ServeScripted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server = serve_scripted()
    main(["once", "--url", f"{server.url}/v1", "--state", str(tmp_path)])
    capfd.readouterr()
    assert main(["status", "--state", str(tmp_path)]) == 0
    assert "no_lesson" in capfd.readouterr().out


@pytest.mark.parametrize("command", ["status", "doubts"])
def test_an_agent_that_nothing_is_logged_of_is_told_as_such(
    serve_scripted: ServeScripted, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    """A name that was written wrong had no cycles and no doubts, like an agent with which all is well."""
    serve_scripted()
    assert main([command, "--state", str(tmp_path), "--agent", "nobody"]) == 1
    assert capfd.readouterr() == (
        "",
        "no episode of an agent 'nobody' is logged; there are some of: the server alone\n",
    )


def test_the_status_says_whom_a_cycle_had_to_do_without(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A wrong key of a judge or an expert stood in the cycle's report alone, which nobody had a reason to read."""
    StepLog(tmp_path / "agent.db").close()
    refused = {"it refuses the key\x1b[2J": 8, "it was not asked any more": 2}
    report = {"expert_problems": refused, "judge": {"problems": {"nobody answers at 127.0.0.1:9": 3, NOT_ASKED: 200}}}
    LearningLog(tmp_path).note("cycle_1", CycleStage.REFUSED, "no gain", report=report)
    assert main(["status", "--state", str(tmp_path)]) == 0
    said = capfd.readouterr().out
    assert said.startswith("1 cycle\n")
    assert "    experts gave no answer 10 times, mostly: it refuses the key\\x1b[2J" in said
    assert "    the judge gave no scores 3 times, mostly: nobody answers at 127.0.0.1:9" in said


def test_the_status_says_of_a_cycle_whose_learner_is_gone_that_it_failed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    StepLog(tmp_path / "agent.db").close()
    log = LearningLog(tmp_path)
    log.note("cycle_1", CycleStage.TRAIN)
    log.close()
    assert main(["status", "--state", str(tmp_path)]) == 0
    shown = capfd.readouterr().out
    assert "failed" in shown
    assert "the learner ended while it was in stage train" in shown


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("http://host:8741", "http://host:8741/v1"),
        ("http://host:8741/", "http://host:8741/v1"),
        ("http://host:8741/v1", "http://host:8741/v1"),
        ("https://host/behind/a/proxy/v1", "https://host/behind/a/proxy/v1"),
    ],
)
def test_the_address_of_the_server_alone_means_its_endpoint(
    monkeypatch: pytest.MonkeyPatch, written: str, meant: str
) -> None:
    assert ServerOptions(url=written).url == meant
    monkeypatch.setenv("STEPAGENT_URL", written)
    assert ServerOptions().url == meant


def test_a_learner_ends_with_the_server_that_started_it(serve_scripted: ServeScripted, tmp_path: Path) -> None:
    """However the server ends, and also while the learner still imports: `kill -9` leaves nobody behind."""
    server = serve_scripted()
    starts_a_learner = f"""
import os, signal, subprocess, sys
arguments = ["--url", "{server.url}/v1", "--state", "{tmp_path}", "--server-pid", str(os.getpid())]
learner = subprocess.Popen([sys.executable, "-m", "learner", "once", *arguments], stdout=subprocess.DEVNULL)
print(learner.pid, flush=True)
input()
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", starts_a_learner]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        learner = Path("/proc") / parent.stdout.readline().strip()
        assert learner.exists()
        parent.stdin.write("\n")
    wait_until(lambda: not learner.exists(), 30)


def test_a_cycle_that_ends_while_it_is_looked_at_has_not_failed(tmp_path: Path) -> None:
    StepLog(tmp_path / "agent.db").close()
    log = LearningLog(tmp_path)
    log.note("cycle_1", CycleStage.GATE)
    reader = LearningReader(tmp_path)
    seen = reader.status("cycle_1")
    log.note("cycle_1", CycleStage.REFUSED, "no gain")
    log.close()
    assert seen is not None
    assert reader.as_of_now(seen).stage is CycleStage.REFUSED
