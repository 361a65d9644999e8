"""Small files in the shapes in which HotpotQA, 2WikiMultihopQA, MuSiQue, WebShop and Mind2Web are published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


WRITERS: dict[str, Callable[[Path], str]] = {
    "hotpotqa": write_hotpotqa,
    "2wikimultihopqa": write_2wiki,
    "musique": write_musique,
    "webshop": write_webshop,
    "mind2web": write_mind2web,
}
