"""The trainer on the real novice: it learns what its objective says, and leaves an adapter that proves itself."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import learner.training.precision
import learner.training.trainer
from learner.objectives.objectives import (
    Likelihood,
    Loss,
    Pair,
    PolicyGradient,
    StepPreference,
    TrajectoryPreference,
    action_sequence,
    normalised,
)
from learner.options import TrainingOptions
from learner.packing.prefix_tree import ScoredSequence, Span
from learner.packing.scoring import SequenceLogprobs
from learner.training.precision import Precision, training_dtype
from learner.training.trainer import Trainer, TrainingFailed
from policies.adapters.base_network import read_base_network
from policies.adapters.files import TENSOR_NAME, WEIGHTS_FILE, weights_digest
from policies.adapters.probe import FULL_TOLERANCE, read_probe
from policies.chat.chat_protocol import ChatProtocol
from policies.types import Adapter
from runtime.adapters.verification import verify_adapter
from runtime.engines.embedded.engine import EmbeddedEngine
from tests.expert_sequences import expert_rows
from tests.serving import NOVICE_FOLDER, ROOT, parts_of
from tests.small_networks import engine_on

QUICK = TrainingOptions(lr=2e-3, epochs=2, min_gradient_steps=0, trajectories_per_step=2, rank=4)


def blunder(protocol: ChatProtocol, row: ScoredSequence) -> ScoredSequence:
    """Another action at the same state: give up at once."""
    wrong = protocol.encode("I am sorry, this order has gone wrong.<|im_end|>")
    return action_sequence(row.token_ids[: row.spans[0].start], wrong, row.owner)


@pytest.fixture(scope="module")
def protocol() -> ChatProtocol:
    return ChatProtocol.load(NOVICE_FOLDER)


@pytest.fixture(scope="module")
def rows(protocol: ChatProtocol) -> list[ScoredSequence]:
    return expert_rows(protocol, "train", 4)


def mean_sum(trainer: Trainer, rows: Sequence[ScoredSequence]) -> float:
    return sum(tokens.sum().item() for tokens in trainer.logprobs(rows)) / len(rows)


def test_imitation_carries_over_to_tasks_it_never_saw(protocol: ChatProtocol, rows: list[ScoredSequence]) -> None:
    unseen = expert_rows(protocol, "validation", 6)
    trainer = Trainer(NOVICE_FOLDER, None, replace(QUICK, epochs=6))
    before = mean_sum(trainer, unseen)
    report = trainer.train(Likelihood("sft", tuple(rows)))
    assert mean_sum(trainer, unseen) > before + 0.01
    assert report.num_gradient_steps == 6 * 2
    assert report.diagnostics["perplexity"] < 1.5


def test_a_seed_decides_the_adapter_to_the_byte(rows: list[ScoredSequence], tmp_path: Path) -> None:
    digests = []
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        trainer = Trainer(NOVICE_FOLDER, None, replace(QUICK, seed=seed))
        trainer.train(Likelihood("sft", tuple(rows)))
        trainer.save(tmp_path / name, [rows[0].token_ids[:20]], "card")
        digests.append(weights_digest(tmp_path / name))
    assert digests[0] == digests[1] != digests[2]


def test_how_rows_are_packed_does_not_change_what_is_learned(rows: list[ScoredSequence]) -> None:
    found = []
    for token_budget in (100, 10_000):
        trainer = Trainer(NOVICE_FOLDER, None, replace(QUICK, token_budget=token_budget))
        trainer.train(Likelihood("sft", tuple(rows)))
        found.append(torch.cat(trainer.logprobs(rows)))
    assert torch.allclose(*found, atol=1e-3)


async def test_what_was_trained_is_what_plain_peft_loads_and_the_engine_serves(
    protocol: ChatProtocol, rows: list[ScoredSequence], tmp_path: Path
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


def test_training_goes_on_from_the_acting_adapter(rows: list[ScoredSequence], tmp_path: Path) -> None:
    first = Trainer(NOVICE_FOLDER, None, QUICK)
    first.train(Likelihood("sft", tuple(rows)))
    first.save(tmp_path / "first", [rows[0].token_ids[:20]], "card")
    second = Trainer(NOVICE_FOLDER, tmp_path / "first", QUICK)
    assert torch.allclose(torch.cat(first.logprobs(rows)), torch.cat(second.logprobs(rows)), atol=1e-4)
    fresh = Trainer(NOVICE_FOLDER, None, QUICK)
    assert torch.equal(torch.cat(fresh.logprobs(rows)), torch.cat(second.logprobs(rows, is_base=True)))


def test_step_preference_parts_the_expert_from_the_blunder_and_keeps_the_expert_likely(
    protocol: ChatProtocol, rows: list[ScoredSequence]
) -> None:
    num = len(rows)
    both = (*rows, *(blunder(protocol, row) for row in rows))
    pairs = tuple(Pair((index,), (num + index,)) for index in range(num))
    trainer = Trainer(NOVICE_FOLDER, None, replace(QUICK, epochs=6))
    chosen, rejected = mean_sum(trainer, both[:num]), mean_sum(trainer, both[num:])
    report = trainer.train(StepPreference(both, pairs, frozenset(range(num)), beta=0.3, anchor_weight=1.0))
    assert mean_sum(trainer, both[:num]) > chosen
    assert mean_sum(trainer, both[num:]) < rejected - 1
    assert report.diagnostics["preference_accuracy"] > 0.8


def test_trajectory_preference_widens_the_gap_between_whole_trajectories(
    protocol: ChatProtocol, rows: list[ScoredSequence]
) -> None:
    trainer = Trainer(NOVICE_FOLDER, None, QUICK)
    report = trainer.train(preference_of_whole_trajectories(protocol, rows))
    assert report.diagnostics["preference_accuracy"] == 1.0


def test_the_policy_gradient_makes_rewarded_actions_likelier_and_punished_ones_less_likely(
    protocol: ChatProtocol, rows: list[ScoredSequence]
) -> None:
    both = (*rows, *(blunder(protocol, row) for row in rows))
    trainer = Trainer(NOVICE_FOLDER, None, QUICK)
    behavior = tuple(tuple(tokens.tolist()) for tokens in trainer.logprobs(both))
    advantages = normalised([1.0] * len(rows) + [0.0] * len(rows))
    good, bad = mean_sum(trainer, both[: len(rows)]), mean_sum(trainer, both[len(rows) :])
    report = trainer.train(PolicyGradient("inverse", both, advantages, behavior))
    assert mean_sum(trainer, both[: len(rows)]) > good
    assert mean_sum(trainer, both[len(rows) :]) < bad
    assert 0 < report.diagnostics["effective_sample_share"] <= 1
    assert report.diagnostics["kl_to_reference"] > 0


def test_equal_rewards_teach_nothing() -> None:
    assert normalised([0.5, 0.5, 0.5]) == (0.0, 0.0, 0.0)


# ---------------------------------------------------------------------------------------------------- memory


def preference_of_whole_trajectories(protocol: ChatProtocol, rows: Sequence[ScoredSequence]) -> TrajectoryPreference:
    """The expert's rows of each task against a blunder at each of its states; a task owns them all."""
    by_task: dict[object, list[ScoredSequence]] = {}
    for row in rows:
        by_task.setdefault(row.owner[0], []).append(row)  # type: ignore[index]
    laid, pairs = [], []
    for task, good in by_task.items():
        sides = [*good, *(blunder(protocol, row) for row in good)]
        first = len(laid)
        laid += [replace(row, owner=(task,)) for row in sides]
        pairs.append(Pair(tuple(range(first, first + len(good))), tuple(range(first + len(good), first + len(sides)))))
    return TrajectoryPreference(tuple(laid), tuple(pairs), beta=0.1)


def test_rows_that_belong_together_and_pass_the_budget_teach_the_same_in_parts(
    protocol: ChatProtocol, rows: list[ScoredSequence], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = preference_of_whole_trajectories(protocol, rows)
    longest = max(len(row.token_ids) for row in rows)
    passes, found = tokens_of_passes(monkeypatch), {}
    for token_budget in (10_000, 1):
        passes.clear()
        trainer = Trainer(NOVICE_FOLDER, None, replace(QUICK, token_budget=token_budget))
        report = trainer.train(objective)
        assert max(passes) <= max(token_budget, longest)
        assert report.diagnostics["preference_accuracy"] == 1.0
        found[token_budget] = torch.cat(trainer.logprobs(rows))
    assert torch.allclose(found[10_000], found[1], atol=1e-3)


def tokens_of_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each forward pass."""
    passes: list[int] = []
    plain_score = learner.training.trainer.score
    monkeypatch.setattr(
        learner.training.trainer,
        "score",
        lambda network, batch: passes.append(batch.input_ids.shape[1]) or plain_score(network, batch),
    )
    return passes


def test_a_prompt_longer_than_the_budget_is_computed_once_for_all_that_begin_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = tuple(range(4, 124))
    rows = [ScoredSequence((*prompt, last, 3), (Span(120, 122),), owner=(last,)) for last in range(4, 12)]
    passes = tokens_of_passes(monkeypatch)
    trainer = Trainer(NOVICE_FOLDER, None, replace(QUICK, token_budget=100, trajectories_per_step=8, epochs=1))
    trainer.train(Likelihood("sft", tuple(rows)))
    assert passes == [120 + 8 * 2]


@pytest.fixture(scope="module")
def under_limits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What becomes of training in a process that is given little, as tests/training_under_limits.py prints it."""
    folder = tmp_path_factory.mktemp("limits") / "made"
    command = [sys.executable, "-m", "tests.training_under_limits", str(folder)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def test_where_memory_runs_out_the_budget_is_halved_and_the_same_is_learned(under_limits: dict[str, Any]) -> None:
    roomy, tight = under_limits["roomy"], under_limits["tight"]
    assert roomy["token_budget"] == 100_000
    assert 700 <= tight["token_budget"] <= 50_000
    assert tight["gain"] == pytest.approx(roomy["gain"], rel=1e-3)
    assert roomy["gain"] > 0.01


def test_no_memory_for_the_longest_row_ends_training_with_what_to_change(under_limits: dict[str, Any]) -> None:
    failed = under_limits["one long row"]["failed"]
    assert "not enough memory on cpu for a pass over 5600 tokens, the longest sequence" in failed
    assert "leave longer episodes out" in failed


def test_a_full_disk_leaves_nothing_behind(under_limits: dict[str, Any]) -> None:
    failed = under_limits["full disk"]["failed"]
    assert "the adapter could not be written to" in failed
    assert "make room there" in failed
    assert under_limits["full disk"]["left"] == []


# ------------------------------------------------------------------------------------------- what goes wrong


@dataclass(frozen=True)
class Broken:
    """A loss of a given value and slope."""

    sequences: tuple[ScoredSequence, ...]
    value: float
    slope: float
    name: str = "broken"
    needs_reference: ClassVar[bool] = False

    def loss(self, scored: SequenceLogprobs, reference: Sequence[Tensor]) -> Loss:
        total = scored.tokens.sum()
        return Loss(self.value + (total - total.detach()) * self.slope, 1.0)


@pytest.mark.parametrize(
    ("value", "slope", "problem"),
    [
        (math.nan, 1.0, "the broken loss became nan at gradient step 1"),
        (math.inf, 1.0, "the broken loss became inf at gradient step 1"),
        (1.0, 1e38, "the gradient of the broken loss became (inf|nan) at gradient step 1"),
    ],
)
def test_a_loss_or_gradient_that_is_no_number_ends_training_with_the_place(
    rows: list[ScoredSequence], value: float, slope: float, problem: str
) -> None:
    trainer = Trainer(NOVICE_FOLDER, None, QUICK)
    with pytest.raises(TrainingFailed, match=problem):
        trainer.train(Broken(tuple(rows), value, slope))


def test_weights_that_are_no_numbers_are_not_written(rows: list[ScoredSequence], tmp_path: Path) -> None:
    """The last gradient step is followed by no loss that would show what it did."""
    trainer = Trainer(NOVICE_FOLDER, None, replace(QUICK, epochs=1, trajectories_per_step=99))
    trainer.train(Likelihood("sft", tuple(rows)))
    weights = next(each for name, each in trainer.network.named_parameters() if "lora_" in name)
    weights.data.fill_(math.inf)
    with pytest.raises(TrainingFailed, match=r"the log probability of an action .* not finite"):
        trainer.logprobs(rows)
    with pytest.raises(TrainingFailed, match=r"lora_.* not finite"):
        trainer.save(tmp_path / "adapter", [rows[0].token_ids[:20]], "card")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- saving


@pytest.fixture(scope="module")
def trained(rows: list[ScoredSequence]) -> Trainer:
    trainer = Trainer(NOVICE_FOLDER, None, QUICK)
    trainer.train(Likelihood("sft", tuple(rows)))
    return trainer


def test_an_adapter_holds_low_rank_pairs_alone_and_its_base_is_as_it_was(trained: Trainer, tmp_path: Path) -> None:
    trained.save(tmp_path / "adapter", [(1, 2, 3)], "card")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    assert all(TENSOR_NAME.fullmatch(name) for name in tensors)
    assert not any(word in name for name in tensors for word in ("embed", "lm_head"))
    stored = load_file(NOVICE_FOLDER / "model.safetensors")
    now = {
        name.replace(".base_layer.", "."): weight
        for name, weight in trained.network.get_base_model().state_dict().items()
        if ".lora_" not in name
    }
    assert now.keys() - stored.keys() <= {"lm_head.weight"}  # tied to the embeddings
    assert all(torch.equal(now[name], weight.float()) for name, weight in stored.items())


def test_the_card_says_what_is_so(protocol: ChatProtocol, rows: list[ScoredSequence], tmp_path: Path) -> None:
    first = Trainer(NOVICE_FOLDER, None, QUICK)
    first.train(Likelihood("sft", tuple(rows)))
    first.save(tmp_path / "agent-v0001", [(1, 2, 3)], "# The first")
    second = Trainer(NOVICE_FOLDER, tmp_path / "agent-v0001", replace(QUICK, seed=5))
    objective = preference_of_whole_trajectories(protocol, rows)
    report = second.train(objective)
    second.save(tmp_path / "second", [(1, 2, 3)], "# The second\n\nOf cycle 2.\n")
    card = (tmp_path / "second" / "README.md").read_text()
    assert card.startswith(f"---\nlibrary_name: peft\nbase_model: {NOVICE_FOLDER}\n---\n")
    assert "# The second\n\nOf cycle 2.\n" in card
    for fact in (
        f"| base | `{NOVICE_FOLDER}` (network {read_base_network(NOVICE_FOLDER).fingerprint[:12]}) |",
        "| parent | agent-v0001 |",
        "| objective | eto |",
        f"| trained on | {len(objective.sequences)} sequences of 4 trajectories |",
        f"| gradient steps | {report.num_gradient_steps}, seed 5 |",
        f"preference_accuracy {report.diagnostics['preference_accuracy']:.4g}",
    ):
        assert fact in card
    assert len(card.splitlines()) < 20
    assert "| parent | none, a fresh LoRA |" in (tmp_path / "agent-v0001" / "README.md").read_text()


def test_an_adapter_is_never_written_over_another(trained: Trainer, tmp_path: Path) -> None:
    trained.save(tmp_path / "adapter", [(1, 2, 3)], "card")
    digest = weights_digest(tmp_path / "adapter")
    with pytest.raises(FileExistsError, match="holds something already"):
        trained.save(tmp_path / "adapter", [(1, 2, 3)], "card")
    assert weights_digest(tmp_path / "adapter") == digest


# ---------------------------------------------------------------------------------------------- half precision


def test_over_a_bfloat16_base_the_adapter_is_trained_and_saved_in_float32(
    rows: list[ScoredSequence], tmp_path: Path
) -> None:
    """As on a GPU, where bfloat16 is the base's type without being asked for."""
    trainer = Trainer(NOVICE_FOLDER, None, replace(QUICK, epochs=4), device="cpu", dtype=torch.bfloat16)
    base_types = {p.dtype for p in trainer.network.parameters() if not p.requires_grad}
    before = mean_sum(trainer, rows)
    trainer.train(Likelihood("sft", tuple(rows)))
    assert base_types == {torch.bfloat16}
    assert {p.dtype for p in trainer.network.parameters() if p.requires_grad} == {torch.float32}
    assert mean_sum(trainer, rows) > before
    trainer.save(tmp_path / "adapter", [row.token_ids[: row.spans[0].start] for row in rows[:6]], "card")
    assert {t.dtype for t in load_file(tmp_path / "adapter" / WEIGHTS_FILE).values()} == {torch.float32}
    plain = AutoModelForCausalLM.from_pretrained(NOVICE_FOLDER, dtype=torch.bfloat16)
    network = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    row = rows[3]
    logits = network(torch.tensor([row.token_ids])).logits[0].float().log_softmax(-1)
    expected = [logits[at - 1, row.token_ids[at]].item() for at in range(row.spans[0].start, len(row.token_ids))]
    assert trainer.logprobs([row])[0].tolist() == pytest.approx(expected, abs=0.15)
    adapter = Adapter("agent-v0001", 1, tmp_path / "adapter", QUICK.rank, None, "0" * 64)
    probe = read_probe(adapter.path)
    assert probe.tolerance == FULL_TOLERANCE, "made in the 32 bits of a CPU's engine"

    async def verify() -> None:
        async with engine_on(NOVICE_FOLDER, adapter) as engine:
            await verify_adapter(engine, adapter, probe)

    asyncio.run(verify())


@pytest.mark.parametrize(
    ("gain", "num_weights", "precision", "dtype"),
    [
        (3.0, 60_000_000, "auto", torch.bfloat16),
        (1.5, 60_000_000, "auto", torch.float32),
        (4.0, 1_000_000, "auto", torch.float32),
        (3.0, 60_000_000, "float32", torch.float32),
        (1.1, 1_000_000, "bfloat16", torch.bfloat16),
    ],
)
def test_on_a_cpu_16_bits_are_taken_where_they_are_faster(
    gain: float, num_weights: int, precision: Precision, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"model.layers.0.up": (num_weights // 100, 100)}
    monkeypatch.setattr(learner.training.precision, "read_base_network", lambda _: SimpleNamespace(shapes=shapes))
    monkeypatch.setattr(learner.training.precision, "gain_of_16_bits", lambda _: gain)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert training_dtype(NOVICE_FOLDER, precision, "cpu") == dtype
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert precision == "bfloat16" or training_dtype(NOVICE_FOLDER, precision, "cpu") == torch.float32


@pytest.mark.parametrize(
    ("num_weights", "stored", "dtype"),
    [
        (60_000_000, torch.float32, torch.float32),
        (60_000_000, torch.bfloat16, torch.bfloat16),
        (60_000_000, torch.float16, torch.bfloat16),
        (1_000_000, torch.bfloat16, torch.float32),
    ],
)
def test_on_a_gpu_a_network_is_trained_as_it_is_stored(
    num_weights: int, stored: torch.dtype, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LlamaConfig(dtype=stored).save_pretrained(tmp_path)
    shapes = {"model.layers.0.up": (num_weights // 100, 100)}
    monkeypatch.setattr(learner.training.precision, "read_base_network", lambda _: SimpleNamespace(shapes=shapes))
    assert training_dtype(tmp_path, "auto", "cuda") == dtype
