"""A judge or a stronger model may answer anything, or nothing: it is a counted problem, and a cycle goes on."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

import pytest
from openai import AsyncOpenAI

from learner.api_key import NO_KEY, key_in
from learner.commands.once import OnceOptions
from learner.data.collect import LoggedEpisode, LoggedState
from learner.data.experts import ExpertAnswer, ModelExpert
from learner.data.judge import Judge
from learner.data.other_model import MOST_SILENCES
from policies.command_line import parse
from policies.types import FinalAnswer
from tests.records import make_chain, make_episode


def episodes(num: int) -> list[LoggedEpisode]:
    made = [make_episode(task="desk/1") for _ in range(num)]
    return [LoggedEpisode(each, tuple(make_chain(each, 1)), None) for each in made]


@contextmanager
def endpoint(body: bytes | Callable[[Any], None], kind: str = "application/json") -> Iterator[AsyncOpenAI]:
    """A client of a server that answers every question so; or what does with the socket what it likes."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            if callable(body):
                body(self)
                return
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield AsyncOpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", max_retries=0)
    finally:
        server.shutdown()
        server.server_close()


def completion(message: object, finish_reason: str = "stop") -> bytes:
    return json.dumps({"choices": [{"index": 0, "finish_reason": finish_reason, "message": message}]}).encode()


FOR_EVER = 10**6


def refusing(num: int, status: int, *headers: tuple[str, str]) -> Callable[[BaseHTTPRequestHandler], None]:
    """Refuses the first so many questions, and answers the others."""
    answers = count()

    def answer(request: BaseHTTPRequestHandler) -> None:
        is_refused = next(answers) < num
        body = b"" if is_refused else completion({"role": "assistant", "content": "Sold out."})
        request.send_response(status if is_refused else 200)
        for name, value in (*(headers if is_refused else ()), ("content-length", str(len(body)))):
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    return answer


def expert_answer(client: AsyncOpenAI) -> tuple[ExpertAnswer | None, int]:
    """(the answer, how many problems)"""
    expert = ModelExpert(client, "m", timeout_s=20.0)
    return asyncio.run(expert.answer(episodes(1)[0].states()[0])), sum(expert.problems.values())


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"<html>Sign in</html>", "text/html"),
        (b"", "application/json"),
        (b"null", "application/json"),
        (b"[1]", "application/json"),
        (b'{"error": {"message": "quota"}}', "application/json"),
        (b'{"choices": null}', "application/json"),
        (b'{"choices": []}', "application/json"),
        (b'{"choices": [null]}', "application/json"),
        (completion(None), "application/json"),
        (completion("hello"), "application/json"),
        (completion({"role": "assistant", "content": 5}), "application/json"),
        (completion({"role": "assistant", "content": "", "tool_calls": 5}), "application/json"),
        (completion({"role": "assistant", "content": "", "tool_calls": [None]}), "application/json"),
        (completion({"role": "assistant", "content": "a {"}, "length"), "application/json"),
    ],
)
def test_what_is_no_whole_chat_completion_is_a_problem_and_no_error(body: bytes, kind: str) -> None:
    """Each of these failed the whole cycle; and an expert's answer that was cut off was learned."""
    with endpoint(body, kind) as client:
        assert expert_answer(client) == (None, 1)
        judge = Judge(client, "m", timeout_s=20.0)
        assert asyncio.run(judge.scores(episodes(2))) == {}
        assert sum(judge.problems.values()) == 1


def test_an_answer_in_parts_is_read() -> None:
    said = completion({"role": "assistant", "content": [{"type": "text", "text": "Sold out."}]})
    with endpoint(said) as client:
        assert expert_answer(client) == (ExpertAnswer(FinalAnswer("Sold out."), "m"), 0)


def test_who_answers_byte_by_byte_is_given_up_and_who_never_answers_is_not_asked_for_ever() -> None:
    """With a client's own limits one silent endpoint held up a cycle for days: ten minutes a state, three times."""

    def drip(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("content-length", "1000000")
        request.end_headers()
        try:
            for _ in range(100):
                request.wfile.write(b" ")
                time.sleep(0.05)
        except OSError:
            pass

    states = [each.states()[0] for each in episodes(MOST_SILENCES + 12)]

    async def ask(expert: ModelExpert) -> list[ExpertAnswer | None]:
        return list(await asyncio.gather(*map(expert.answer, states)))

    with endpoint(drip) as client:
        expert = ModelExpert(client, "m", timeout_s=0.3, patience_s=0.0)
        began = time.monotonic()
        assert asyncio.run(ask(expert)) == [None] * len(states)
        assert time.monotonic() - began < 5.0
    silence = "TimeoutError: no whole answer in 0.3 s"
    given_up = f"it was not asked any more after {MOST_SILENCES} questions without any answer, the last one: {silence}"
    assert expert.problems == {silence: MOST_SILENCES, given_up: len(states) - MOST_SILENCES}  # nor a second round


def test_who_answers_after_silences_is_asked_on() -> None:
    """Where silences and open questions together are as many as end the asking, the others wait for the open ones."""
    silent = iter([True] * (MOST_SILENCES - 1))

    def answer(request: BaseHTTPRequestHandler) -> None:
        if next(silent, False):
            time.sleep(0.5)
            return
        time.sleep(0.7)
        body = completion({"role": "assistant", "content": "Sold out."})
        request.send_response(200)
        request.send_header("content-length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    states = [each.states()[0] for each in episodes(MOST_SILENCES + 4)]

    async def ask(expert: ModelExpert) -> list[ExpertAnswer | None]:
        return list(await asyncio.gather(*map(expert.answer, states)))

    with endpoint(answer) as client:
        answers = asyncio.run(ask(ModelExpert(client, "m", timeout_s=20.0)))
    assert answers.count(None) == MOST_SILENCES - 1


def test_refusals_in_a_row_are_no_silence() -> None:
    """A long episode's states may all pass the other model's context; the next episode's do not."""

    async def ask(expert: ModelExpert) -> None:
        for each in episodes(MOST_SILENCES + 2):
            await expert.answer(each.states()[0])

    with endpoint(refusing(FOR_EVER, 400)) as client:
        expert = ModelExpert(client, "m", timeout_s=20.0)
        asyncio.run(ask(expert))
    assert expert.problems == {"BadRequestError: Error code: 400": MOST_SILENCES + 2}


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, "it refuses the key (STEPAGENT_EXPERT_API_KEY, STEPAGENT_JUDGE_API_KEY)"),
        (404, "it has no such address or no such model"),
        (429, "it is asked too often, or its quota is used up"),
        (500, "InternalServerError"),
    ],
)
def test_who_refuses_whatever_is_asked_is_not_asked_for_ever(status: int, told: str) -> None:
    """One that said of each of thousands of states "come again in a minute" held up a cycle for a day."""

    async def ask(expert: ModelExpert) -> None:
        for each in episodes(MOST_SILENCES + 20):
            await expert.answer(each.states()[0])

    with endpoint(refusing(FOR_EVER, status)) as client:
        expert = ModelExpert(client, "m", timeout_s=20.0, patience_s=0.0 if status in (429, 500) else 60.0)
        asyncio.run(ask(expert))
    assert sorted(expert.problems.values()) == [MOST_SILENCES, 20]
    assert all(told in problem for problem in expert.problems)  # the status names the one that is most frequent


@pytest.mark.parametrize("status", [429, 503])
def test_who_is_asked_too_often_for_a_while_is_asked_on(status: int) -> None:
    """A burst of refusals is no end: eight at once, and an expert was given up for the whole cycle."""
    states = [each.states()[0] for each in episodes(2 * MOST_SILENCES)]

    async def ask(expert: ModelExpert) -> list[ExpertAnswer | None]:
        return list(await asyncio.gather(*map(expert.answer, states)))

    with endpoint(refusing(MOST_SILENCES, status)) as client:
        answers = asyncio.run(ask(ModelExpert(client, "m", timeout_s=20.0)))
    assert answers.count(None) == MOST_SILENCES


def test_who_says_when_to_come_again_is_asked_then_and_the_reason_is_told() -> None:
    with endpoint(refusing(1, 429, ("retry-after", "1"))) as client:
        expert = ModelExpert(client.with_options(max_retries=1), "m", timeout_s=20.0)
        began = time.monotonic()
        assert asyncio.run(expert.answer(episodes(1)[0].states()[0])) is not None
        assert time.monotonic() - began >= 1.0
    with endpoint(refusing(FOR_EVER, 429, ("retry-after", "60"))) as client:
        expert = ModelExpert(client.with_options(max_retries=1), "m", timeout_s=0.5)
        assert asyncio.run(expert.answer(episodes(1)[0].states()[0])) is None
    assert next(iter(expert.problems)).startswith("it is asked too often, or its quota is used up")


def test_an_answer_that_breaks_off_is_asked_for_again() -> None:
    answers = count()

    def break_off_once(request: BaseHTTPRequestHandler) -> None:
        body = completion({"role": "assistant", "content": "Sold out."})
        request.send_response(200)
        request.send_header("content-length", str(len(body)))
        request.end_headers()
        request.wfile.write(body if next(answers) else body[:20])
        request.close_connection = True

    with endpoint(break_off_once) as client:
        assert expert_answer(client.with_options(max_retries=1)) == (ExpertAnswer(FinalAnswer("Sold out."), "m"), 0)


def test_an_answer_that_breaks_off_or_never_ends_is_a_problem() -> None:
    def break_off(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("content-length", "1000")
        request.end_headers()
        request.wfile.write(b'{"choices":')

    def go_on(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        with suppress(OSError):
            while True:
                request.wfile.write(b" " * 65536)

    for answers, told in ((break_off, "broke off"), (go_on, "larger than 4 MiB")):
        with endpoint(answers) as client:
            expert = ModelExpert(client, "m", timeout_s=20.0)
            assert asyncio.run(expert.answer(episodes(1)[0].states()[0])) is None
        assert told in next(iter(expert.problems))


def test_a_call_where_no_tools_were_offered_is_no_answer() -> None:
    """It was learned: an agent without tools began to call them."""
    call = {"id": "a", "type": "function", "function": {"name": "search", "arguments": "{}"}}
    (state,) = episodes(1)[0].states()
    state = LoggedState(state.task, (replace(state.step, tools=()),))
    with endpoint(completion({"role": "assistant", "content": None, "tool_calls": [call]})) as client:
        expert = ModelExpert(client, "m", timeout_s=20.0)
        assert asyncio.run(expert.answer(state)) is None
    assert expert.problems == {"ValueError: it calls search where no tools were offered": 1}


@pytest.mark.parametrize(("status", "place"), [(401, 0), (400, 0), (200, 0), (200, 30), (401, 30), (200, 120)])
def test_an_endpoint_that_repeats_the_key_does_not_put_it_into_the_report(status: int, place: int) -> None:
    """Whole, or cut in two where a long answer ends."""

    def repeat(request: BaseHTTPRequestHandler) -> None:
        said = {"error": {"message": f"{'.' * place} wrong: {request.headers['authorization']}, {'.' * 300}"}}
        body = json.dumps(said).encode()
        request.send_response(status)
        request.send_header("content-type", "application/json")
        request.send_header("content-length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    with endpoint(repeat) as client:
        asking = client.with_options(api_key="s3cret-s3cret-s3cret-s3cret")
        expert, judge = ModelExpert(asking, "m", timeout_s=20.0), Judge(asking, "m", timeout_s=20.0)
        asyncio.run(expert.answer(episodes(1)[0].states()[0]))
        asyncio.run(judge.scores(episodes(2)))
    for problems in (expert.problems, judge.problems):
        assert len(problems) == 1
        assert "s3cret" not in str(problems)


def test_a_judge_that_says_the_key_and_no_scores_does_not_put_it_into_the_report() -> None:
    said = completion({"role": "assistant", "content": f"{'.' * 70}s3cret-s3cret-s3cret-s3cret"})
    with endpoint(said) as client:
        judge = Judge(client.with_options(api_key="s3cret-s3cret-s3cret-s3cret"), "m", timeout_s=20.0)
        assert asyncio.run(judge.scores(episodes(2))) == {}
    (problem,) = judge.problems
    assert "no score of each attempt" in problem
    assert "s3cret" not in problem


def test_an_empty_key_is_none_and_no_other_endpoints_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """`STEPAGENT_JUDGE_API_KEY=` ended the learner, or sent the judge what OPENAI_API_KEY held."""
    monkeypatch.setenv("A_KEY", " ")
    assert key_in("A_KEY") == NO_KEY
    monkeypatch.setenv("A_KEY", "sk-1\n")
    assert key_in("A_KEY") == "sk-1"
    monkeypatch.delenv("A_KEY")
    assert key_in("A_KEY") == NO_KEY


@pytest.mark.parametrize("option", ["judge", "expert"])
@pytest.mark.parametrize("url", ["judge.internal", "127.0.0.1:8001/v1", "ftp://judge/v1", "http://", "http://a:b/v1"])
def test_an_address_that_nobody_can_be_asked_at_is_refused_at_once(
    option: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(OnceOptions, [f"--{option}-url", url, f"--{option}-model", "m"], "once")
    assert f"--{option}-url {url!r} is no address" in capsys.readouterr().err
