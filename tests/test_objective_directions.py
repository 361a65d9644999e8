"""Which way each objective moves a network: trained by the trainer, on a tiny one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from learner.data.training_data import PolicyAction, State, TrainingData, Trajectory
from learner.objectives.build import objective_of
from learner.objectives.objectives import action_sequence
from learner.options import ObjectiveOptions, TrainingOptions
from learner.training.trainer import Trainer
from policies.types import TokenIds

torch.set_num_threads(1)
OPTIONS = ObjectiveOptions()
RIGHT, WRONG, RARE = (7, 2), (8, 9, 2), (11, 2)
PROMPTS: tuple[TokenIds, ...] = ((10, 3), (12, 4, 4), (14, 5), (16, 6, 6))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def trainer_of(base: Path) -> Trainer:
    return Trainer(base, None, TrainingOptions(lr=2e-2, min_gradient_steps=8, rank=4), "cpu")


def likelihood(trainer: Trainer, prompt: TokenIds, action: TokenIds) -> float:
    return trainer.logprobs([action_sequence(prompt, action, (0,))])[0].sum().item()


def sampled(trainer: Trainer, prompt: TokenIds, action: TokenIds, agrees: bool | None = None) -> PolicyAction:
    """As if the network had drawn it."""
    logprobs = trainer.logprobs([action_sequence(prompt, action, (0,))])[0].tolist()
    return PolicyAction("step", action, tuple(logprobs), agrees)


def episode(name: str, states: tuple[State, ...], outcome: float | None = None) -> Trajectory:
    return Trajectory(name, states, None, outcome)


def test_sft_rft_makes_what_experts_do_and_what_succeeded_likelier_and_leaves_failures_alone(base: Path) -> None:
    trainer = trainer_of(base)
    training_data = TrainingData(
        (episode("a", (State("a-0", PROMPTS[0], RIGHT, ()),), 1.0),),
        (
            episode("b", (State("b-0", PROMPTS[1], None, (sampled(trainer, PROMPTS[1], WRONG),)),), 1.0),
            episode("c", (State("c-0", PROMPTS[2], None, (sampled(trainer, PROMPTS[2], RARE),)),), 0.0),
        ),
    )
    objective = objective_of("sft_rft", training_data, OPTIONS)
    assert all(sequence.token_ids[:2] != PROMPTS[2] for sequence in objective.sequences)
    watched = ((PROMPTS[0], RIGHT), (PROMPTS[1], WRONG))
    before = [likelihood(trainer, *each) for each in watched]
    trainer.train(objective)
    after = [likelihood(trainer, *each) for each in watched]
    assert all(now > then + 1 for now, then in zip(after, before, strict=True))


def test_pivot_pushes_agreeing_samples_up_and_others_down_also_without_an_anchor(base: Path) -> None:
    trainer = trainer_of(base)
    samples = (sampled(trainer, PROMPTS[0], RIGHT, True), sampled(trainer, PROMPTS[0], WRONG, False))
    training_data = TrainingData((episode("a", (State("a-0", PROMPTS[0], RARE, samples),), 1.0),))
    before = likelihood(trainer, PROMPTS[0], RIGHT), likelihood(trainer, PROMPTS[0], WRONG)
    trainer.train(objective_of("pivot", training_data, replace(OPTIONS, anchor_weight=0.0)))
    after = likelihood(trainer, PROMPTS[0], RIGHT), likelihood(trainer, PROMPTS[0], WRONG)
    assert after[0] > before[0]
    assert after[1] < before[1]


def test_dft_pulls_less_than_sft_at_what_the_policy_finds_unlikely(base: Path) -> None:
    training_data = TrainingData((episode("a", (State("a-0", PROMPTS[0], RARE, ()),), 1.0),))
    gained = {}
    for name in ("sft", "dft"):
        trainer = trainer_of(base)
        objective = objective_of(name, training_data, OPTIONS)
        trainer._gradient(objective, range(len(objective.sequences)), trainer.logprobs(objective.sequences), "here")
        gained[name] = sum(p.grad.norm().item() for p in trainer.network.parameters() if p.grad is not None)
    assert 0 < gained["dft"] < 0.5 * gained["sft"]
