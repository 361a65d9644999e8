"""Multi-hop questions over geographical facts, on the real packages and our real search."""

from __future__ import annotations

import json
import re

import pytest

from tests_worlds import promises
from tools.worlds import load_world
from tools.worlds.calls import answering, calling
from tools.worlds.multihop_qa import MultihopQA
from tools.worlds.questions import Question, QuestionEpisode, exact_match, f1, sought_title


@pytest.fixture(scope="module")
def world() -> MultihopQA:
    loaded = load_world("multihop_qa")
    assert isinstance(loaded, MultihopQA)
    return loaded


def test_no_city_is_asked_about_in_two_splits(world: MultihopQA) -> None:
    promises.assert_tasks_are_told_apart(world)
    texts = [task.messages[1]["content"] for task in promises.all_tasks(world)]
    assert len(set(texts)) == len(texts) > 5000
    first_queries = [world.item(task.split, task.index).queries[0] for task in promises.all_tasks(world)]
    assert len(set(first_queries)) == len(first_queries)


def test_questions_need_two_to_four_facts(world: MultihopQA) -> None:
    num_facts = [len(world.item(task.split, task.index).queries) for task in promises.all_tasks(world)]
    assert {number: num_facts.count(number) / len(num_facts) > 0.2 for number in set(num_facts)} == {
        2: True, 3: True, 4: True,
    }  # fmt: skip


def test_each_search_of_the_expert_finds_its_fact_and_the_last_one_the_answer(world: MultihopQA) -> None:
    for task in promises.some_tasks(world, every=25):
        episode = world.open(task)
        assert isinstance(episode, QuestionEpisode)
        said = promises.follow_expert(episode)
        observed = [message["content"] for message in said if message["role"] == "tool"]
        for query, passages in zip(episode.question.queries, observed, strict=True):
            subject = re.sub(r" (country capital currency|currency number ISO|language code ISO)$", "", query)
            assert f"{subject}: " in passages, query
        answer = episode.question.answers[0]
        assert answer in observed[-1] or answer in ("yes", "no")
        assert (episode.outcome(), episode.f1()) == (1.0, 1.0)


def test_a_fact_counts_as_found_in_whatever_words_it_was_searched_for(world: MultihopQA) -> None:
    num_tried = 0
    for task in promises.some_tasks(world, every=40):
        episode = world.open(task)
        assert isinstance(episode, QuestionEpisode)
        for query in episode.question.queries:
            action = episode.expert_action()
            [call] = action["tool_calls"]
            assert json.loads(call["function"]["arguments"]) == {"query": query}
            other = f"please tell me of {query.lower()}"
            episode.play(calling("search", {"query": other, "num_results": 10}, episode.num_moves))
            num_tried += 1
        assert not episode.expert_action().get("tool_calls"), episode.question
    assert num_tried > 200


def test_a_search_that_finds_something_else_leaves_the_expert_where_it_was(world: MultihopQA) -> None:
    episode = world.open(world.task("train", 3))
    before = episode.expert_action()["tool_calls"][0]["function"]
    for query in ("Mogadish", "currency", "Lisbon"):
        episode.play(calling("search", {"query": query}, episode.num_moves))
        assert episode.expert_action()["tool_calls"][0]["function"] == before


def test_an_expert_gets_on_whose_search_finds_nothing_and_hinders_no_other_search(world: MultihopQA) -> None:
    """Wikipedia has titles without a word in them, such as !!!"""
    found = world.open(world.task("train", 3))
    assert isinstance(found, QuestionEpisode)
    question = Question("?", ("yes",), ("!!!", "qqqzzz"))
    episode = QuestionEpisode(question, found._search)
    [told] = episode.play(calling("search", {"query": "Mogadishu"}, 0))
    assert "Mogadishu: " in told["content"]
    [told] = episode.play(calling("search", {"query": "nothingofthekind"}, 1))
    for number, query in enumerate(question.queries, start=2):
        action = episode.expert_action()
        assert json.loads(action["tool_calls"][0]["function"]["arguments"]) == {"query": query}
        episode.play(calling("search", {"query": "nothingofthekind"}, number))
        episode.play(action)
    assert episode.expert_action()["content"] == "yes"


@pytest.mark.parametrize(
    ("title", "query", "found"),
    [
        ("Somalia", "Somalia country capital currency", ["Somalia", "Djibouti"]),
        ("Somali Shilling", "Somali Shilling currency number ISO", ["Kenyan Shilling", "Somali Shilling"]),
        ("The Netherlands", "Netherlands country capital currency", ["Germany", "The Netherlands"]),
        ("Oslo (city)", "where is it", ["Oslo (city)", "Bergen"]),
    ],
)
def test_which_of_the_found_passages_was_sought(title: str, query: str, found: list[str]) -> None:
    assert sought_title(query, found) == title


@pytest.mark.parametrize(
    ("said", "right", "exact", "overlap"),
    [
        ("The Euro.", ["Euro"], 1.0, 1.0),
        ("euro", ["Euro", "EUR"], 1.0, 1.0),
        ("It is the Euro", ["Euro"], 0.0, 0.5),
        ("978", ["978"], 1.0, 1.0),
        ("yes", ["no"], 0.0, 0.0),
        ("yes it is", ["yes"], 0.0, 0.0),
        ("", ["Oslo"], 0.0, 0.0),
        ("New York City", ["York"], 0.0, 0.5),
    ],
)
def test_scores_are_those_of_hotpotqa(said: str, right: list[str], exact: float, overlap: float) -> None:
    assert (exact_match(said, right), f1(said, right)) == (exact, pytest.approx(overlap))


def test_the_answer_decides_and_guessing_needs_no_search(world: MultihopQA) -> None:
    episode = world.open(world.task("heldout", 3))
    assert episode.outcome() == 0.0
    episode.play(answering("I do not know."))
    assert (episode.is_done, episode.outcome()) == (True, 0.0)


def test_tools_bad_input_and_copies(world: MultihopQA) -> None:
    task = world.task("train", 0)
    promises.assert_tools_convert(world.open(task))
    promises.assert_found_by_text(world, task)
    promises.assert_bad_calls_are_told_in_words(world, task)
    promises.assert_episodes_do_not_mix(world, task)
    promises.assert_server_tools_act_as_play(world, task)
    promises.assert_same_effect_is_judged(world, task)
    episode = world.open(task)
    answer = episode.question.answers[0]
    assert episode.same_effect(answering(answer), answering(f" {answer}. "))
    assert not episode.same_effect(answering(answer), answering("Elsewhere"))


def test_twenty_searches_are_replayed_quickly(world: MultihopQA) -> None:
    promises.assert_reopens_quickly(world, world.task("train", 0))
