"""The best of several draws: all are logged, the scorer's choice is answered, and without it nothing changes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from policies.chat.chat_protocol import ChatProtocol
from policies.types import Draw, EngineError, FinalAnswer, MalformedAction, SamplingParams, ToolCall, ToolCalls
from runtime.agent.scorers import ChosenBy, Majority, MeanLogprob, _warn_once, best
from runtime.agent.served_agent import ServedAgent
from runtime.agent.tools import Toolbox
from runtime.agents import AgentsFileProblem
from runtime.config import parse_settings
from runtime.engines.embedded.engine import EmbeddedEngine
from runtime.http.best_of import Choosing, ChoosingAsked, ChoosingLimits
from runtime.http.fields import FieldRefused
from runtime.store.episodes import Purpose
from tests.serving import MODEL, SayingEngine, Served, parts_of, served

ASKED = [{"role": "user", "content": "Order 7000 has come in."}]


def ask(server: Served, best_of: int | None = None, by: str | None = None, **body: Any) -> httpx.Response:
    headers = {"x-stepagent-best-of": str(best_of)} if best_of is not None else {}
    headers |= {"x-stepagent-best-of-by": by} if by else {}
    sent = {"model": MODEL, "messages": ASKED, **body}
    return httpx.post(f"{server.url}/v1/chat/completions", json=sent, headers=headers, timeout=60)


def said(answer: httpx.Response) -> str:
    answer.raise_for_status()
    return answer.json()["choices"][0]["message"]["content"]


def draw(text: str, *logprobs: float) -> Draw:
    return Draw((1,) * len(logprobs), logprobs, FinalAnswer(text))


# ----------------------------------------------------------------------------------------------- scorers


def scores(scorer: Any, *draws: Draw) -> list[float]:
    return asyncio.run(scorer.scores((1, 2), draws))


def test_the_majority_counts_what_means_the_same_and_nothing_for_what_cannot_be_read() -> None:
    same = ToolCalls((ToolCall("a", "pick", {"item": "mug", "count": 2}),))
    again = ToolCalls((ToolCall("b", "pick", {"count": 2.0, "item": "mug"}),), text="So:")
    broken = MalformedAction("<x", "no end")
    draws = [Draw((1,), (-0.1,), action) for action in (broken, same, FinalAnswer("No."), again, broken)]
    assert scores(Majority(), *draws) == [0.0, 2.0, 1.0, 2.0, 0.0]


def test_the_mean_logprob_is_a_mean_and_not_a_sum() -> None:
    assert scores(MeanLogprob(), draw("short", -1.0), draw("long", -0.5, -0.5, -0.5)) == [-1.0, -0.5]


def test_what_cannot_be_read_is_taken_only_where_nothing_can_and_equals_go_to_the_surer() -> None:
    broken = Draw((1,), (-0.01,), MalformedAction("<x", "no end"))
    assert best([broken, draw("b", -2.0), draw("c", -1.0)], [9.0, 1.0, 1.0]) == 2
    assert best([draw("b", -1.0), draw("c", -1.0)], [1.0, 1.0]) == 0
    assert best([broken, broken], [0.0, 1.0]) == 1


def test_what_a_limit_cut_off_is_taken_only_where_no_draw_is_whole() -> None:
    cut, broken = replace(draw("b", -0.01), is_cut=True), Draw((1,), (-0.01,), MalformedAction("<x", "no end"))
    assert best([cut, draw("c", -1.0), broken], [9.0, 1.0, 9.0]) == 1
    assert best([broken, cut], [9.0, 1.0]) == 1


# ----------------------------------------------------------------------------------- what is asked for


def test_practice_and_evaluation_are_the_policys_own_draws_unless_they_ask() -> None:
    limits = ChoosingLimits(Choosing(4, ChosenBy.MAJORITY), most=8)
    nothing, six = ChoosingAsked(), ChoosingAsked(6)
    assert limits.chosen(nothing, Purpose.SERVE, 1.0) == Choosing(4, ChosenBy.MAJORITY)
    assert limits.chosen(nothing, Purpose.PRACTICE, 1.0).num_draws == 1
    assert limits.chosen(nothing, Purpose.EVALUATION, 1.0).num_draws == 1
    assert limits.chosen(six, Purpose.EVALUATION, 1.0).num_draws == 6
    assert limits.chosen(six, Purpose.SERVE, 0.0).num_draws == 1  # all draws would be the same
    assert limits.chosen(ChoosingAsked(1), Purpose.SERVE, 1.0).num_draws == 1
    with pytest.raises(FieldRefused, match="at most 8"):
        limits.chosen(ChoosingAsked(9), Purpose.SERVE, 1.0)


@pytest.mark.parametrize(
    ("best_of", "by", "words"),
    [
        ("0", None, "is no number of draws"),
        ("two", None, "is no number of draws"),
        ("-1", None, "is no number of draws"),
        ("99999999999999999999", None, "is no number of draws"),
        ("9", None, "at most 8"),
        ("2", "fate", "is not one of auto, discriminator, mean_logprob, majority"),
        ("2", "discriminator", "the base network has no reward model"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_a_sentence(
    protocol: ChatProtocol, tmp_path: Path, best_of: str, by: str | None, words: str
) -> None:
    with served(parts_of(SayingEngine(protocol), protocol, tmp_path)) as server:
        answer = ask(server, best_of=best_of, by=by)  # type: ignore[arg-type]
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_a_servers_own_discriminator_falls_back_until_there_is_one_and_the_log_says_so_once(
    protocol: ChatProtocol, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _warn_once.cache_clear()
    parts = parts_of(SayingEngine(protocol), protocol, tmp_path)
    parts = replace(parts, choosing=ChoosingLimits(Choosing(2, ChosenBy.DISCRIMINATOR)))
    with served(parts) as server:
        assert said(ask(server)) == said(ask(server, best_of=3)) == "All done."
        step = server.parts.log.steps(server.parts.log.episodes()[0].id)[0]
        assert {each.scorer for each in server.parts.log.candidates(step.id)} == {"mean_logprob"}
        refused = ask(server, by="discriminator")
    assert (refused.status_code, "no reward model" in refused.json()["error"]["message"]) == (400, True)
    assert sum("best of several by discriminator" in record.message for record in caplog.records) == 1


# -------------------------------------------------------------------------------------- a served answer


def test_the_choice_is_answered_and_all_draws_are_logged_with_their_scores(
    protocol: ChatProtocol, tmp_path: Path
) -> None:
    engine = SayingEngine(protocol, "Yes.", "No.", "no.", "Maybe.")
    with served(parts_of(engine, protocol, tmp_path)) as server:
        answer = ask(server, best_of=4, by="majority", seed=7)
        assert said(answer) in ("No.", "no.")
        (step,) = server.parts.log.steps(answer.headers["x-episode-id"])
        drawn = server.parts.log.candidates(step.id)
        assert [each.action for each in drawn] == [FinalAnswer(text) for text in ("Yes.", "No.", "no.", "Maybe.")]
        assert [each.score for each in drawn] == [1.0, 2.0, 2.0, 1.0]
        assert {each.scorer for each in drawn} == {"majority"}
        (chosen,) = [each for each in drawn if each.is_chosen]
        assert step.completion_token_ids == chosen.completion_token_ids
        assert step.behavior_logprobs == chosen.logprobs
        assert step.sampling.best_of == 4
        assert not step.sampling.is_policy, "a choice is no draw of the policy: no gradient may take it for one"
        usage = answer.json()["usage"]
        assert usage["completion_tokens"] == len(step.completion_token_ids), "usage is what the client sees"
        metrics = httpx.get(f"{server.url}/metrics").text
        beside = sum(len(each.completion_token_ids) for each in drawn if not each.is_chosen)
        assert f'kind="not_chosen"}} {beside}.0' in metrics
        shown = httpx.get(f"{server.url}/v1/episodes/{step.episode_id}").json()["steps"][0]
        assert [each["is_chosen"] for each in shown["candidates"]].count(True) == 1
        assert server.parts.log.verify() == []
        assert server.parts.log.step(step.id) == step
    assert engine.samplings[0].seed == 7, "the first draw is what would have been answered without a choice"
    assert len({sampling.seed for sampling in engine.samplings}) == 4
    assert all(-(2**63) <= sampling.seed < 2**63 for sampling in engine.samplings if sampling.seed is not None)


@pytest.mark.parametrize(
    ("body", "header", "num_drawn"),
    [
        ({"best_of": 3}, None, 3),
        ({"best_of": 3, "stream": True}, None, 3),
        ({"best_of": 3}, 2, 2),
        ({"best_of": 3, "temperature": 0}, None, 0),
        ({"best_of": 1}, None, 0),
        ({"best_of": None}, None, 2),
        ({"best_of": 2, "n": 2}, None, 0),
    ],
)
def test_the_body_may_say_how_many_are_drawn_as_in_openais_older_completions(
    protocol: ChatProtocol, tmp_path: Path, body: dict[str, Any], header: int | None, num_drawn: int
) -> None:
    """It was passed over, with a warning."""
    limits = ChoosingLimits(Choosing(2, ChosenBy.MEAN_LOGPROB))
    headers = {} if header is None else {"x-stepagent-best-of": str(header)}
    with served(parts_of(SayingEngine(protocol), protocol, tmp_path, choosing=limits)) as server:
        sent = {"model": MODEL, "messages": ASKED, **body}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=sent, headers=headers, timeout=60)
        assert (answer.status_code, answer.headers.get("x-stepagent-warning")) == (200, None)
        assert server.parts.log.counts()["step_candidates"] == num_drawn


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"best_of": 0}, "best_of: Input should be greater than or equal to 1"),
        ({"best_of": "3"}, "best_of: Input should be a valid integer"),
        ({"best_of": 9}, "best_of: this server draws at most 8"),
        ({"best_of": 4, "n": 2}, "best_of: it finds one answer, and n asks for 2"),
        ({"best_of": 1, "n": 2}, "best_of: it finds one answer, and n asks for 2"),
    ],
)
def test_a_best_of_in_the_body_that_cannot_be_is_refused_by_its_name(
    protocol: ChatProtocol, tmp_path: Path, body: dict[str, Any], words: str
) -> None:
    with served(parts_of(SayingEngine(protocol), protocol, tmp_path)) as server:
        sent = {"model": MODEL, "messages": ASKED, **body}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=sent, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "best_of")
    assert words in answer.json()["error"]["message"]


def test_an_answer_that_max_tokens_cuts_is_not_chosen_before_one_that_fits(
    protocol: ChatProtocol, tmp_path: Path
) -> None:
    """A cut one lacks the end of its turn, which is often the least sure of its tokens: half a JSON object won."""
    whole, endless = "Yes.", "No, " * 20
    max_tokens = len(protocol.encode(whole + "<|im_end|>"))
    engine = SayingEngine(protocol, endless, whole, endless)
    with served(parts_of(engine, protocol, tmp_path)) as server:
        answer = ask(server, best_of=3, by="majority", max_tokens=max_tokens)
        assert (said(answer), answer.json()["choices"][0]["finish_reason"]) == (whole, "stop")


def test_a_stream_is_the_chosen_answer_after_the_choice(protocol: ChatProtocol, tmp_path: Path) -> None:
    engine = SayingEngine(protocol, "Yes.", "No.", "No.")
    with served(parts_of(engine, protocol, tmp_path)) as server:
        stream = server.client().chat.completions.create(
            model=MODEL,
            messages=ASKED,  # type: ignore[arg-type]
            stream=True,
            extra_headers={"x-stepagent-best-of": "3", "x-stepagent-best-of-by": "majority"},
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == "No."
        assert server.parts.log.counts()["step_candidates"] == 3


def test_a_run_with_the_servers_tools_chooses_at_every_step(protocol: ChatProtocol, tmp_path: Path) -> None:
    call = '<tool_call>\n{"name": "check_item", "arguments": {"item": "lantern"}}\n</tool_call>'
    engine = SayingEngine(protocol, call, "Sold out.", call, "Sold out.", "Sold out.", call)
    with served(parts_of(engine, protocol, tmp_path)) as server:
        answer = ask(server, best_of=3, by="majority", metadata={"task": "order_desk/train/1"})
        assert said(answer) == "Sold out."
        steps = server.parts.log.steps(answer.headers["x-episode-id"])
        assert [len(server.parts.log.candidates(step.id)) for step in steps] == [3, 3]


def test_each_of_several_choices_is_chosen_for_itself(protocol: ChatProtocol, tmp_path: Path) -> None:
    engine = SayingEngine(protocol, *["Same."] * 6)
    with served(parts_of(engine, protocol, tmp_path)) as server:
        answer = ask(server, best_of=3, n=2)
        assert [choice["message"]["content"] for choice in answer.json()["choices"]] == ["Same.", "Same."]
        assert server.parts.log.counts()["step_candidates"] == 6
        assert server.parts.load._free == 32, "every place was given back"


def test_without_it_one_draw_is_made_and_nothing_is_logged_beside_the_step(
    protocol: ChatProtocol, tmp_path: Path
) -> None:
    engine = SayingEngine(protocol, "Yes.")
    with served(parts_of(engine, protocol, tmp_path)) as server:
        assert said(ask(server)) == "Yes."
        assert len(engine.prompts) == 1
        assert server.parts.log.counts()["step_candidates"] == 0


def test_at_an_agents_own_temperature_0_one_draw_is_made(protocol: ChatProtocol, tmp_path: Path) -> None:
    """Where the request does not say: as many draws were made as asked for, all the same."""
    engine = SayingEngine(protocol, "Yes.")
    greedy = ServedAgent("clerk", "clerk", Toolbox(), sampling={"temperature": 0.0})
    with served(parts_of(engine, protocol, tmp_path, named_agents=(greedy,))) as server:
        assert said(ask(server, best_of=4, by="discriminator", model="clerk")) == "Yes."
        assert [each.temperature for each in engine.samplings] == [0.0]
        assert server.parts.log.counts()["step_candidates"] == 0


def test_an_agent_has_a_number_of_draws_and_a_chooser_of_its_own(protocol: ChatProtocol, tmp_path: Path) -> None:
    """Where the request does not say, and not for whoever asks for the base network by name."""
    engine = SayingEngine(protocol, *["Same."] * 20)
    agents = (
        ServedAgent("clerk", "clerk", Toolbox(), choosing=ChoosingAsked(3, ChosenBy.MAJORITY)),
        ServedAgent("plain", "plain", Toolbox(), choosing=ChoosingAsked(1)),
    )
    limits = ChoosingLimits(Choosing(2, ChosenBy.MEAN_LOGPROB), most=4)
    asked: list[tuple[dict[str, Any], list[str]]] = [
        ({"model": "clerk"}, ["majority"] * 3),
        ({"model": "clerk", "best_of": 2}, ["majority"] * 2),
        ({"model": "clerk", "by": "mean_logprob"}, ["mean_logprob"] * 3),
        ({"model": "clerk", "best_of": 1}, []),
        ({"model": "plain"}, []),
        ({"model": MODEL}, ["mean_logprob"] * 2),
        ({"model": "clerk:base"}, ["mean_logprob"] * 2),
        ({"model": "clerk", "metadata": {"purpose": "practice"}}, []),
    ]
    with served(parts_of(engine, protocol, tmp_path, named_agents=agents, choosing=limits)) as server:
        for number, (request, scorers) in enumerate(asked):
            answer = ask(server, **{"messages": [{"role": "user", "content": f"Order {number} is in."}], **request})
            (step,) = server.parts.log.steps(answer.headers["x-episode-id"])
            assert [each.scorer for each in server.parts.log.candidates(step.id)] == scorers, request
        assert server.parts.load._free == 32, "every place was given back"


def test_an_agents_table_says_how_many_and_a_mistake_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "agents.toml"
    file.write_text("[agents.clerk]\nbest_of = 4\nbest_of_by = 'majority'\n")
    table = parse_settings(["--agents", str(file)]).agents_file.agents["clerk"]
    assert (table.best_of, table.best_of_by) == (4, "majority")
    for wrong in ("best_of = 0", "best_of = 65", "best_of = '4'", "best_of_by = 'fate'", "best_off = 4"):
        file.write_text(f"[agents.clerk]\n{wrong}\n")
        with pytest.raises((SystemExit, AgentsFileProblem), match="line 2"):
            parse_settings(["--agents", str(file)]).agents_file  # noqa: B018


def test_a_draw_that_fails_fails_the_answer_and_leaves_no_step(protocol: ChatProtocol, tmp_path: Path) -> None:
    engine = SayingEngine(protocol, "Yes.", [600_000], "No.")
    with served(parts_of(engine, protocol, tmp_path)) as server:
        engine.says.clear()

        def dies(*_: Any) -> Sequence[int]:
            raise EngineError("it died")

        engine._script = dies
        assert ask(server, best_of=3).status_code >= 500
        assert server.parts.log.counts()["steps"] == 0


def test_a_run_with_little_left_counts_every_draw(protocol: ChatProtocol, tmp_path: Path) -> None:
    from runtime.agent.budget import RunBudget, RunLimits

    budget = RunBudget(RunLimits(max_completion_tokens=100), max_tokens=60)
    assert budget.most_tokens(1) == 60
    assert budget.most_tokens(4) == 25
    assert budget.most_tokens(200) == 1


# ------------------------------------------------------------------------------------- the engine scores


def test_the_embedded_engine_scores_a_given_completion_as_it_would_have_drawn_it(
    novice_engine: EmbeddedEngine, protocol: ChatProtocol
) -> None:
    prompt = protocol.render(ASKED)

    async def drawn_and_scored() -> tuple[list[float], tuple[float, ...], tuple[float, ...]]:
        sampling = SamplingParams(max_tokens=24, seed=3)
        drawn = [token async for token in novice_engine.generate(prompt, sampling, None)]
        told = [token.token_id for token in drawn]
        return (
            [token.logprob for token in drawn],
            await novice_engine.score(prompt, told, None),
            await novice_engine.score(prompt, told[:1], None),
        )

    drawn, scored, first = asyncio.run(drawn_and_scored())
    assert scored == pytest.approx(drawn, abs=1e-4)
    assert first == pytest.approx(drawn[:1], abs=1e-4)
    for wrong in ((), (10**9,)):
        with pytest.raises(EngineError):
            asyncio.run(novice_engine.score(prompt, wrong, None))
