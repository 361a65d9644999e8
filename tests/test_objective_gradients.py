"""Each objective on random trees: packed and accumulated, its loss and gradient are those of one row after another."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from learner.objectives.objectives import (
    Likelihood,
    Objective,
    Pair,
    PolicyGradient,
    StepPreference,
    TrajectoryPreference,
    action_sequence,
)
from learner.options import TrainingOptions
from learner.packing.prefix_tree import ScoredSequence
from learner.packing.scoring import SequenceLogprobs
from learner.training.discriminator import Discrimination
from learner.training.trainer import Trainer

VOCAB_SIZE = 40
LONGEST_ROW = 60
NUM_STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trainers(base: Path) -> dict[int, Trainer]:
    """One network for each token budget: all in one pack, several packs, and too little for what belongs together."""
    made = {}
    for token_budget in (10_000, 3 * LONGEST_ROW, 1):
        trainer = Trainer(base, None, TrainingOptions(rank=4, token_budget=token_budget), device="cpu")
        generator = torch.Generator().manual_seed(1)
        for name, parameter in trainer.network.named_parameters():
            if ".lora_" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        made[token_budget] = trainer
    return made


# ------------------------------------------------------------------------------------------------ random trees


class Tree:
    """Two trajectories that begin alike, with an expert's and one or two own actions at each state."""

    def __init__(self, seed: int, owner_of: Callable[[int, int], tuple[object, ...]]) -> None:
        """`owner_of(trajectory, state)` owns the rows of a state."""
        draw = random.Random(seed)

        def tokens() -> tuple[int, ...]:
            return tuple(draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 5)))

        self.draw = draw
        self.rows: list[ScoredSequence] = []
        self.experts: list[int] = []
        self.own_of: dict[int, list[int]] = {}
        self.trajectory_of: dict[int, int] = {}
        prompt = tokens()
        for trajectory in range(2):
            context = prompt
            for state in range(NUM_STEPS):
                context, expert = context + tokens(), len(self.rows)
                owner, action = owner_of(trajectory, state), tokens()
                others = [tokens() for _ in range(draw.randint(1, 2))]
                self.experts.append(expert)
                self.own_of[expert] = [expert + 1 + number for number in range(len(others))]
                self.trajectory_of[expert] = trajectory
                self.rows += [
                    action_sequence(context, each, owner, draw.uniform(0.1, 2.0)) for each in (action, *others)
                ]
                context += action

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return tuple(
            Pair((expert,), (own,), 1.0 / len(self.own_of[expert]))
            for expert in self.experts
            for own in self.own_of[expert]
        )


def by_state(trajectory: int, state: int) -> tuple[object, ...]:
    return (trajectory, state)


def likelihood(seed: int) -> Objective:
    return Likelihood("sft", tuple(Tree(seed, by_state).rows))


def step_preference(seed: int) -> Objective:
    tree = Tree(seed, by_state)
    return StepPreference(tuple(tree.rows), tree.pairs, frozenset(tree.experts), beta=0.3, anchor_weight=0.5)


def trajectory_preference(seed: int) -> Objective:
    tree = Tree(seed, lambda trajectory, state: (trajectory,))
    pairs = []
    for trajectory in range(2):
        experts = [expert for expert in tree.experts if tree.trajectory_of[expert] == trajectory]
        pairs.append(Pair(tuple(experts), tuple(own for expert in experts for own in tree.own_of[expert])))
    return TrajectoryPreference(tuple(tree.rows), tuple(pairs), beta=0.1)


def policy_gradient(seed: int) -> Objective:
    tree = Tree(seed, by_state)
    num_tokens = [row.spans[0].stop - row.spans[0].start for row in tree.rows]
    return PolicyGradient(
        "inverse",
        tuple(tree.rows),
        advantages=tuple(tree.draw.gauss(0, 1) for _ in tree.rows),
        behavior_logprobs=tuple(tuple(-3.7 + tree.draw.gauss(0, 1) for _ in range(num)) for num in num_tokens),
        anchored=frozenset(tree.experts),
        anchor_weight=0.3,
    )


def discrimination(seed: int) -> Objective:
    tree = Tree(seed, by_state)
    return Discrimination(tuple(tree.rows), tree.pairs, anchor_weight=0.1)


OBJECTIVES = {
    make.__name__: make
    for make in (likelihood, step_preference, trajectory_preference, policy_gradient, discrimination)
}


# ------------------------------------------------------------------------------------------------ row by row


def plain_logprobs(network: torch.nn.Module, row: ScoredSequence) -> Tensor:
    """By the book: one pass over one row, log-softmax everywhere, then the scored tokens."""
    ids = torch.tensor(row.token_ids)
    logprobs = network(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return torch.cat([logprobs[span.start - 1 : span.stop - 1] for span in row.spans])


def row_by_row(network: torch.nn.Module, objective: Objective, ref: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    tokens = [plain_logprobs(network, row) for row in objective.sequences]
    weights = [span.weight for row in objective.sequences for span in row.spans for _ in range(span.start, span.stop)]
    sequence_of_token = [number for number, row in enumerate(tokens) for _ in row]
    everything = SequenceLogprobs(
        tuple(range(len(tokens))), torch.cat(tokens), torch.tensor(sequence_of_token), torch.tensor(weights)
    )
    network.zero_grad()
    total = objective.loss(everything, ref).total
    total.backward()
    return total.item(), gradients_of(network)


def gradients_of(network: torch.nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("token_budget", [10_000, 3 * LONGEST_ROW, 1])
@pytest.mark.parametrize("kind", OBJECTIVES)
@given(seed=st.integers(0, 100_000))
@settings(deadline=None, max_examples=5)
def test_packed_loss_and_gradient_are_those_of_one_row_after_another(
    trainers: dict[int, Trainer], kind: str, token_budget: int, seed: int
) -> None:
    trainer, objective = trainers[token_budget], OBJECTIVES[kind](seed)
    assert max(len(row.token_ids) for row in objective.sequences) <= LONGEST_ROW
    ref = trainer.logprobs(objective.sequences, is_base=True)
    total, gradients = row_by_row(trainer.network, objective, ref)
    trainer.network.zero_grad()
    _, losses = trainer._accumulate(objective, range(len(objective.sequences)), ref, "here")
    packed = gradients_of(trainer.network)
    assert sum(loss.total.item() for loss in losses) == pytest.approx(total, rel=1e-4, abs=1e-4)
    assert len(packed) == len(gradients) > 0
    scale = max(gradient.abs().max().item() for gradient in gradients)
    assert scale > 1e-3, "there is a gradient to compare"
    for one, other in zip(packed, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * scale)
