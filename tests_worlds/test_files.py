"""Worlds of files that users bring: small files in the published shape, and files that are something else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests_worlds import promises
from tools.worlds import load_world
from tools.worlds.calls import answering, calling
from tools.worlds.questions import QuestionEpisode
from tools.worlds.webshop import WebShop
from tools.worlds.world import World

TOWNS = ("Alba", "Brod", "Celje", "Delft", "Evora", "Fulda", "Ghent", "Hasselt", "Imola", "Jena")


def hotpot_entry(number: int) -> dict[str, Any]:
    town, river = TOWNS[number], f"{TOWNS[number]}a River"
    return {
        "_id": f"5a8b57f25542995d1e6f137{number}",
        "answer": f"{number}10 km",
        "question": f"How long is the river that flows through {town}?",
        "supporting_facts": [[river, 0], [town, 1], [town, 0]],
        "context": [
            [town, [f"{town} is a town.", f" It lies on the {river}."]],
            [river, [f"The {river} is {number}10 km long."]],
            ["Mount Nowhere", ["Mount Nowhere is a mountain."]],
        ],
        "type": "bridge",
        "level": "medium",
    }


def musique_entry(number: int) -> dict[str, Any]:
    town = TOWNS[number]
    return {
        "id": f"2hop__{number}_{number}",
        "paragraphs": [
            {"idx": 0, "title": town, "paragraph_text": f"{town} is ruled by {town}o.", "is_supporting": True},
            {
                "idx": 1,
                "title": f"{town}o",
                "paragraph_text": f"{town}o was born in 19{number}0.",
                "is_supporting": True,
            },
            {"idx": 2, "title": "Mount Nowhere", "paragraph_text": "A mountain.", "is_supporting": False},
        ],
        "question": f"When was the ruler of {town} born?",
        "question_decomposition": [
            {"id": 1, "question": f"{town} >> ruler", "answer": f"{town}o", "paragraph_support_idx": 0},
            {"id": 2, "question": "When was #1 born?", "answer": f"19{number}0", "paragraph_support_idx": 1},
        ],
        "answer": f"19{number}0",
        "answer_aliases": [f"in 19{number}0"],
        "answerable": number != 9,
    }


def write_hotpotqa(folder: Path) -> str:
    file = folder / "hotpot_dev_distractor_v1.json"
    file.write_text(json.dumps([hotpot_entry(number) for number in range(10)]))
    return f"hotpotqa:{file}"


def write_2wiki(folder: Path) -> str:
    file = folder / "dev.json"
    extra = {"evidences": [], "answer_id": "Q7"}
    file.write_text(json.dumps([hotpot_entry(number) | extra for number in range(10)]))
    (folder / "id_aliases.json").write_text('{"Q_id": "Q7", "aliases": ["a long way"], "demonyms": []}\n')
    return f"2wikimultihopqa:{file}"


def write_musique(folder: Path) -> str:
    file = folder / "musique_ans_v1.0_dev.jsonl"
    file.write_text("".join(json.dumps(musique_entry(number)) + "\n" for number in range(10)))
    return f"musique:{file}"


def write_webshop(folder: Path) -> str:
    products, attributes, instructions = [], {}, {}
    for number in range(10):
        asin, town = f"B00000000{number}", TOWNS[number]
        products.append(
            {
                "asin": asin,
                "name": f"{town} cotton shirt for walkers",
                "full_description": f"A shirt from {town}.",
                "small_description": ["Machine wash", f"Made in {town}"],
                "pricing": f"${number + 10}.99",
                "category": "fashion",
                "query": "shirts",
                "product_category": "Clothing › Men › Shirts",
                "customization_options": {
                    "Size": [{"value": "small", "image": None}, {"value": "X-Large", "image": None}],
                    "Color": [{"value": "black/white"}],
                    "Fit": None,
                },
                "images": [""],
            }
        )
        attributes[asin] = {
            "attributes": ["machine wash", "long sleeve"],
            "instruction": "",
            "instruction_attributes": [],
        }
        instructions[asin] = [
            {
                "asin": asin,
                "instruction": f"I want a {town} shirt, machine wash, in small.",
                "instruction_attributes": ["machine wash"],
                "instruction_options": ["small"],
            },
            {"asin": asin, "instruction": "x", "instruction_attributes": [], "instruction_options": []},
        ]
    (folder / "items_shuffle_1000.json").write_text(json.dumps(products))
    (folder / "items_ins_v2_1000.json").write_text(json.dumps(attributes))
    (folder / "items_human_ins.json").write_text(json.dumps(instructions))
    return f"webshop:{folder / 'items_shuffle_1000.json'}"


def write_mind2web(folder: Path) -> str:
    def candidate(id: str, tag: str, is_target: bool, **attributes: str) -> dict[str, Any]:
        return {
            "tag": tag,
            "attributes": json.dumps({"backend_node_id": id, **attributes}),
            "is_original_target": is_target,
            "is_top_level_target": is_target,
            "backend_node_id": id,
        }

    def entry(number: int) -> dict[str, Any]:
        html = (
            '<html backend_node_id="1"><body backend_node_id="2"><form backend_node_id="3">'
            f'<input backend_node_id="4" placeholder="From"/>'
            f'<button backend_node_id="5">Find <b>{TOWNS[number]}</b></button>'
            '<select backend_node_id="6"><option backend_node_id="7">One way</option></select></form></body></html>'
        )
        others = [candidate("2", "body", False), candidate("3", "form", False)]
        field, button = candidate("4", "input", True, placeholder="From"), candidate("5", "button", True)
        steps = [
            ("TYPE", TOWNS[number], field),
            ("SELECT", "One way", candidate("6", "select", True)),
            ("CLICK", "", button),
        ]
        return {
            "annotation_id": f"annotation-{number}",
            "website": "trains",
            "domain": "Travel",
            "subdomain": "Ground",
            "confirmed_task": f"Find a train from {TOWNS[number]}.",
            "action_reprs": [],
            "actions": [
                {
                    "action_uid": f"{number}-{place}",
                    "raw_html": html,
                    "cleaned_html": html,
                    "operation": {"original_op": op, "op": op, "value": value},
                    "pos_candidates": [] if number == 9 and place == 1 else [target],
                    "neg_candidates": others,
                }
                for place, (op, value, target) in enumerate(steps)
            ],
        }

    (folder / "train_0.json").write_text(json.dumps([entry(number) for number in range(10)]))
    return f"mind2web:{folder / 'train_0.json'}"


WRITERS = {
    "hotpotqa": write_hotpotqa,
    "2wikimultihopqa": write_2wiki,
    "musique": write_musique,
    "webshop": write_webshop,
    "mind2web": write_mind2web,
}


@pytest.fixture(params=sorted(WRITERS))
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return load_world(WRITERS[request.param](tmp_path))


def test_every_promise_of_a_world(world: World) -> None:
    promises.assert_tasks_are_told_apart(world)
    left_out = 1 if world.name in ("musique", "mind2web") else 0
    assert sum(world.splits.values()) == 10 - left_out
    assert set(promises.outcomes_of_expert(world, promises.all_tasks(world)).values()) == {1.0}
    task = world.task("train", 0)
    promises.assert_tools_convert(world.open(task))
    promises.assert_found_by_text(world, task)
    promises.assert_episodes_do_not_mix(world, task)
    promises.assert_server_tools_act_as_play(world, task)
    promises.assert_same_effect_is_judged(world, task)
    promises.assert_reopens_quickly(world, task, limit_s=0.1)
    if world.name != "mind2web":  # there a wrong call ends the episode
        promises.assert_bad_calls_are_told_in_words(world, task)


def test_aliases_are_accepted_and_the_question_names_the_first_search(tmp_path: Path) -> None:
    for writer, alias in ((write_2wiki, "A long way."), (write_musique, "in 1900")):
        world = load_world(writer(tmp_path))
        episode = world.open(world.task("train", 0))
        assert isinstance(episode, QuestionEpisode)
        assert episode.question.queries[0] == "Alba"
        episode.play(answering(alias))
        assert episode.outcome() == 1.0


def test_webshop_scores_by_attributes_options_price_and_kind(tmp_path: Path) -> None:
    world = load_world(write_webshop(tmp_path))
    assert isinstance(world, WebShop)
    assert "price lower than" in world.task("train", 0).messages[0]["content"]

    def bought(product_id: str, *options: tuple[str, str]) -> float:
        episode = world.open(world.task("train", 0))
        episode.play(calling("open_product", {"product_id": product_id}, 0))
        for option, value in options:
            episode.play(calling("choose_option", {"option": option, "value": value}, 1))
        episode.play(calling("buy", {}, 2))
        return episode.outcome()

    assert bought("B000000000", ("Size", "small")) == 1.0
    assert bought("B000000000", ("size", "X-Large")) == pytest.approx(2 / 3)
    assert bought("B000000000") == pytest.approx(2 / 3)
    assert bought("B000000001", ("size", "small")) == 1.0, "another product that meets every wish will do"
    assert bought("nothing") == 0.0


def test_mind2web_shows_the_page_and_ends_where_the_recording_does_not_go_on(tmp_path: Path) -> None:
    world = load_world(write_mind2web(tmp_path))
    task = world.task("train", 0)
    assert "[4] input placeholder='From'" in task.messages[0]["content"]
    assert "[3] form  Find Alba One way" in task.messages[0]["content"]
    episode = world.open(task)
    [told] = episode.play(calling("type_text", {"element": "4", "text": " alba "}, 0))
    assert "[6] select" in told["content"]
    episode.play(calling("select_option", {"element": "4", "value": "One way"}, 1))
    assert (episode.is_done, episode.outcome(), episode.expert_action()) == (True, 0.0, None)


@pytest.mark.parametrize("name", sorted(WRITERS))
@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2]", '[{"question": 5}]', '{"a": 1}', "[[[[", '[{"actions": 3}]', "null"]
)
def test_a_file_of_something_else_is_refused_in_words(name: str, content: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    file = tmp_path / "items_shuffle_1000.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        load_world(f"{name}:{file}")


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_file_that_is_missing_or_binary_is_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="items_shuffle_9"):
        load_world(f"{name}:{tmp_path / 'items_shuffle_9.json'}")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary|items_human_ins"):
        load_world(f"{name}:{tmp_path / 'binary'}")
    with pytest.raises(ValueError, match="FILE"):
        load_world(name)
