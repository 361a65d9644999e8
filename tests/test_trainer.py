"""The trainer on the real novice: it learns what its objective says, and leaves an adapter that proves itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from learner.batch import RowLogprobs
from learner.objectives import (
    Likelihood,
    Loss,
    Objective,
    Pair,
    PolicyGradient,
    StepPreference,
    TrajectoryPreference,
    action_row,
    normalised,
)
from learner.prefix_tree import Row
from learner.trainer import Trainer, TrainingFailed, TrainingOptions
from policies.adapter_files import weights_digest
from policies.chat_protocol import ChatProtocol, message_action
from policies.types import FinalAnswer
from runtime.engines.embedded import EmbeddedEngine
from tests.serving import NOVICE_FOLDER, parts_of
from tools.worlds.order_desk import OrderDesk

QUICK = TrainingOptions(epochs=2, trajectories_per_step=2, rank=4)


def expert_rows(protocol: ChatProtocol, split: str, num_tasks: int) -> list[Row]:
    """The expert's actions on some tasks, one row each."""
    world, rows = OrderDesk(), []
    for index in range(num_tasks):
        task = world.task(split, index)
        episode, messages = world.open(task), list(task.messages)
        while True:
            message = episode.expert_action()
            action = message_action(message)
            prompt, completion = protocol.completion_of(messages, action)
            rows.append(action_row(prompt, completion, (task.id, len(rows))))
            if isinstance(action, FinalAnswer):
                break
            messages += [message, *episode.play(message)]
    return rows


def blunder(protocol: ChatProtocol, row: Row) -> Row:
    """Another action at the same state: give up at once."""
    wrong = protocol.encode("I am sorry, this order has gone wrong.<|im_end|>")
    return action_row(row.token_ids[: row.spans[0].start], wrong, row.owner)


@pytest.fixture(scope="module")
def protocol() -> ChatProtocol:
    return ChatProtocol.load(NOVICE_FOLDER)


@pytest.fixture(scope="module")
def rows(protocol: ChatProtocol) -> list[Row]:
    return expert_rows(protocol, "train", 4)


def mean_sum(trainer: Trainer, rows: Sequence[Row]) -> float:
    return sum(tokens.sum().item() for tokens in trainer.logprobs(rows)) / len(rows)


def test_imitation_carries_over_to_tasks_it_never_saw(protocol: ChatProtocol, rows: list[Row]) -> None:
    unseen = expert_rows(protocol, "validation", 6)
    trainer = Trainer(NOVICE_FOLDER, None, replace(QUICK, epochs=6))
    before = mean_sum(trainer, unseen)
    report = trainer.train(Likelihood("sft", tuple(rows)))
    assert mean_sum(trainer, unseen) > before + 0.01
    assert report.num_gradient_steps == 6 * 2
    assert report.health["perplexity"] < 1.5


def test_a_seed_decides_the_adapter_to_the_byte(rows: list[Row], tmp_path: Path) -> None:
    digests = []
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        trainer = Trainer(NOVICE_FOLDER, None, replace(QUICK, seed=seed))
        trainer.train(Likelihood("sft", tuple(rows)))
        trainer.save(tmp_path / name, [rows[0].token_ids[:20]], "card")
        digests.append(weights_digest(tmp_path / name))
    assert digests[0] == digests[1] != digests[2]


def test_how_rows_are_packed_does_not_change_what_is_learned(rows: list[Row]) -> None:
    found = []
    for token_budget in (100, 10_000):
        trainer = Trainer(NOVICE_FOLDER, None, replace(QUICK, token_budget=token_budget))
        trainer.train(Likelihood("sft", tuple(rows)))
        found.append(torch.cat(trainer.logprobs(rows)))
    assert torch.allclose(*found, atol=1e-3)


async def test_what_was_trained_is_what_plain_peft_loads_and_the_engine_serves(
    protocol: ChatProtocol, rows: list[Row], tmp_path: Path
) -> None:
    trainer = Trainer(NOVICE_FOLDER, None, QUICK)
    trainer.train(Likelihood("sft", tuple(rows)))
    trainer.save(tmp_path / "adapter", [row.token_ids[: row.spans[0].start] for row in rows[:6]], "a card")
    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(NOVICE_FOLDER), str(tmp_path / "adapter"))
    row = rows[3]
    logits = network(torch.tensor([row.token_ids])).logits[0].log_softmax(-1)
    start = row.spans[0].start
    plain = [logits[at - 1, row.token_ids[at]].item() for at in range(start, len(row.token_ids))]
    assert trainer.logprobs([row])[0].tolist() == pytest.approx(plain, abs=1e-4)
    engine = EmbeddedEngine(NOVICE_FOLDER, num_threads=1)
    parts = parts_of(engine, protocol, tmp_path / "state")
    try:
        adapter = parts.registry.register(tmp_path / "adapter")
        await parts.swap.promote(adapter.name)  # validates, loads, and verifies against the probe
        assert parts.registry.acting() == adapter
    finally:
        await engine.close()
        parts.log.close()


def test_training_goes_on_from_the_acting_adapter(rows: list[Row], tmp_path: Path) -> None:
    first = Trainer(NOVICE_FOLDER, None, QUICK)
    first.train(Likelihood("sft", tuple(rows)))
    first.save(tmp_path / "first", [rows[0].token_ids[:20]], "card")
    second = Trainer(NOVICE_FOLDER, tmp_path / "first", QUICK)
    assert torch.allclose(torch.cat(first.logprobs(rows)), torch.cat(second.logprobs(rows)), atol=1e-4)
    fresh = Trainer(NOVICE_FOLDER, None, QUICK)
    assert torch.equal(torch.cat(fresh.logprobs(rows)), torch.cat(second.logprobs(rows, is_base=True)))


def test_step_preference_parts_the_expert_from_the_blunder_and_keeps_the_expert_likely(
    protocol: ChatProtocol, rows: list[Row]
) -> None:
    num = len(rows)
    both = (*rows, *(blunder(protocol, row) for row in rows))
    pairs = tuple(Pair((index,), (num + index,)) for index in range(num))
    trainer = Trainer(NOVICE_FOLDER, None, replace(QUICK, epochs=6))
    chosen, rejected = mean_sum(trainer, both[:num]), mean_sum(trainer, both[num:])
    report = trainer.train(StepPreference(both, pairs, frozenset(range(num)), beta=0.3, anchor_weight=1.0))
    assert mean_sum(trainer, both[:num]) > chosen
    assert mean_sum(trainer, both[num:]) < rejected - 1
    assert report.health["preference_accuracy"] > 0.8


def test_trajectory_preference_widens_the_gap_between_whole_trajectories(
    protocol: ChatProtocol, rows: list[Row]
) -> None:
    by_task: dict[object, list[Row]] = {}
    for row in rows:
        by_task.setdefault(row.owner[0], []).append(row)  # type: ignore[index]
    laid, pairs = [], []
    for task, good in by_task.items():
        sides = [*good, *(blunder(protocol, row) for row in good)]
        first = len(laid)
        laid += [replace(row, owner=(task,)) for row in sides]
        pairs.append(Pair(tuple(range(first, first + len(good))), tuple(range(first + len(good), first + len(sides)))))
    trainer = Trainer(NOVICE_FOLDER, None, QUICK)
    report = trainer.train(TrajectoryPreference(tuple(laid), tuple(pairs), beta=0.1))
    assert report.health["preference_accuracy"] == 1.0


def test_the_policy_gradient_makes_rewarded_actions_likelier_and_punished_ones_less_likely(
    protocol: ChatProtocol, rows: list[Row]
) -> None:
    both = (*rows, *(blunder(protocol, row) for row in rows))
    trainer = Trainer(NOVICE_FOLDER, None, QUICK)
    behavior = tuple(tuple(tokens.tolist()) for tokens in trainer.logprobs(both))
    advantages = normalised([1.0] * len(rows) + [0.0] * len(rows))
    good, bad = mean_sum(trainer, both[: len(rows)]), mean_sum(trainer, both[len(rows) :])
    report = trainer.train(PolicyGradient("inverse", both, advantages, behavior))
    assert mean_sum(trainer, both[: len(rows)]) > good
    assert mean_sum(trainer, both[len(rows) :]) < bad
    assert 0 < report.health["effective_sample_share"] <= 1
    assert report.health["kl_to_reference"] > 0


def test_equal_rewards_teach_nothing() -> None:
    assert normalised([0.5, 0.5, 0.5]) == (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class NotANumber:
    rows: tuple[Row, ...]
    name: str = "broken"

    def loss(self, scored: RowLogprobs, reference: Sequence[Tensor]) -> Loss:
        return Loss(scored.tokens.sum() * float("nan"), 1.0)


def test_a_loss_that_is_no_number_ends_training_with_the_place(rows: list[Row]) -> None:
    objective: Objective = NotANumber(tuple(rows))
    with pytest.raises(TrainingFailed, match="broken loss became nan at gradient step 1"):
        Trainer(NOVICE_FOLDER, None, QUICK).train(objective)
