"""benchmarks/real_in_worlds.py counts, on packed transcripts, the actions that greedy decoding would write, and tries
whole tasks with the network that has learned on packs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.real_in_worlds import agreements, in_tokens, tried
from benchmarks.rollouts import Attempt, Rollouts
from benchmarks.transcripts import expert_conversations, first_steps, of_one_agent, states_of, tools_of
from learner.packing.tree_attention import TREE_ATTENTION
from policies.chat.chat_protocol import ChatProtocol
from policies.novice.build import NOVICE_PATH
from policies.types import TokenIds
from tests.faulty_worlds import COUNT, numbers
from tools.worlds import load_world
from tools.worlds.calls import calling


def test_a_state_counts_where_greedy_decoding_would_write_the_expert_s_action() -> None:
    world = load_world("order_desk")
    conversations = expert_conversations(world, "heldout", 6)
    tools, protocol = tools_of(world, conversations), ChatProtocol.load(NOVICE_PATH)
    tried = [in_tokens(protocol, each, tools) for each in conversations]
    packed = AutoModelForCausalLM.from_pretrained(NOVICE_PATH, attn_implementation=TREE_ATTENTION).eval()
    plain = AutoModelForCausalLM.from_pretrained(NOVICE_PATH).eval()
    expected = []
    for trajectory in tried:
        right = []
        for state in trajectory.states:
            assert state.expert is not None
            written = plain.generate(
                torch.tensor([state.prompt]), max_new_tokens=len(state.expert), do_sample=False, eos_token_id=-1
            )
            right.append(tuple(written[0, len(state.prompt) :].tolist()) == state.expert)
        expected.append(sum(right) / len(right))
    assert agreements(packed, tried) == expected
    assert 0 < sum(expected) < len(expected)  # the novice does some of it, and not all


def test_transcripts_are_cut_after_an_action_and_begin_differently() -> None:
    conversations = expert_conversations(load_world("order_desk"), "train", 5)
    assert len({str(each[1]) for each in conversations}) == 5
    cut = first_steps(conversations[0], 2)
    assert len(list(states_of(cut))) == 2
    assert cut[-1]["role"] == "assistant"
    assert first_steps(conversations[0], 1000) == conversations[0]


def test_tools_that_a_transcript_calls_are_found_though_the_first_task_has_not_all_of_them() -> None:
    def schemas(episode: Any) -> list[dict[str, Any]]:
        return [{**COUNT, "name": f"count_{episode.item % 3}"}]

    world = numbers(schemas=schemas)
    transcripts = [[calling(f"count_{rest}", {}, 0)] for rest in (1, 0)]
    assert {tool["function"]["name"] for tool in tools_of(world, transcripts)} == {"count_0", "count_1"}
    with pytest.raises(ValueError, match="no task of numbers has the tool 'count_7'"):
        tools_of(world, [[calling("count_7", {}, 0)]])


def test_one_agents_transcripts_need_only_what_most_tasks_offer() -> None:
    def schemas(episode: Any) -> list[dict[str, Any]]:
        names = ["count_0", "count_1"] if episode.item % 3 else ["count_0", "count_7"]
        return [{**COUNT, "name": name} for name in names]

    def transcript(*names: str) -> list[dict[str, Any]]:
        return [calling(name, {}, 0) for name in names]

    transcripts = [transcript("count_0"), transcript("count_7"), transcript("count_0", "count_1"), transcript()]
    assert of_one_agent(numbers(schemas=schemas), transcripts) == [transcripts[0], *transcripts[2:]]


def test_whole_tasks_are_tried_by_the_network_that_learns_as_by_a_plain_one() -> None:
    world = load_world("order_desk")
    tools = tools_of(world, expert_conversations(world, "heldout", 6))
    tasks = [world.task("heldout", index) for index in range(12)]
    rollouts = Rollouts(world, ChatProtocol.load(NOVICE_PATH), tools)
    packed = AutoModelForCausalLM.from_pretrained(NOVICE_PATH, attn_implementation=TREE_ATTENTION).eval()
    plain = AutoModelForCausalLM.from_pretrained(NOVICE_PATH).eval()
    expected = rollouts.attempts(plain, tasks, [0.0] * len(tasks), torch.Generator())
    found = tried(rollouts, packed, tasks)
    assert [attempt.messages for attempt in found] == [attempt.messages for attempt in expected]
    assert packed.config._attn_implementation == TREE_ATTENTION
    assert all(
        attempt.states == [] and attempt.prompt[: len(start)] == start for attempt, start in _starts(found, tools)
    )


def _starts(attempts: list[Attempt], tools: list[Any]) -> list[tuple[Attempt, TokenIds]]:
    """Each attempt, and what it must begin with: the task's words, and the tools."""
    protocol = ChatProtocol.load(NOVICE_PATH)
    return [(attempt, protocol.render(attempt.task.messages, tools)) for attempt in attempts]
