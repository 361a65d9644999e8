"""Trains a LoRA on an objective, packed, and leaves it as a plain PEFT folder with its proof beside it.

A trainer begins where the acting adapter is (or with a fresh one on the base). It keeps no optimizer state between
cycles: a cycle is short, and moments of other data are no help. The reference needs no second copy of the network:
its logprobs are taken once, before the first gradient step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from learner.batch import RowLogprobs, reference, score, to_batch
from learner.objectives import Objective, trajectories_of
from learner.prefix_tree import Row, pack_rows
from learner.probing import make_probe
from learner.tree_attention import TREE_ATTENTION
from policies.base_network import read_base_network
from policies.probe import write_probe
from policies.types import TokenIds

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class TrainingFailed(Exception):
    """Training came to nothing: a loss that is not a number, or no memory; the message says where."""


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How a candidate is trained. The defaults suit a small network; a full-size one wants a smaller lr."""

    lr: float = 2e-3
    """Peak learning rate of AdamW; warmed up over a tenth of the gradient steps, then cosine to a tenth."""
    epochs: int = 4
    trajectories_per_step: int = 8
    """Trajectories whose rows make one gradient step."""
    rank: int = 16
    """Of a fresh adapter; one that goes on keeps its own."""
    token_budget: int = 4096
    """Most tokens of one packed forward pass: what bounds the memory."""
    max_grad_norm: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """How training went."""

    num_gradient_steps: int
    num_tokens: int
    """Packed tokens that went forward and backward."""
    health: dict[str, float]
    """Means over the last epoch."""


class Trainer:
    """One candidate in the making."""

    def __init__(self, base: Path, adapter: Path | None, options: TrainingOptions, device: str = "auto") -> None:
        """`adapter` is the acting adapter's folder; None begins with a fresh LoRA that changes nothing yet."""
        self.options = options
        self._base = base
        self._device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        torch.manual_seed(options.seed)
        dtype = torch.bfloat16 if self._device == "cuda" else torch.float32
        network: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation=TREE_ATTENTION)
        network.to(self._device)
        self.network: Any = (
            PeftModel.from_pretrained(network, str(adapter), is_trainable=True)
            if adapter
            else get_peft_model(network, fresh_lora(options.rank))
        )
        self.network.eval()  # no dropout: a packed pass must score what the engine would

    def logprobs(self, rows: Sequence[Row], is_base: bool = False) -> list[Tensor]:
        """Token logprobs of each row's scored tokens, without gradient: of the network as it is now, or of its base."""
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for pack in pack_rows(rows, self._budget(rows)):
            with torch.no_grad():
                if is_base:
                    with reference(self.network):
                        scored = score(self.network, to_batch(pack, self._device))
                else:
                    scored = score(self.network, to_batch(pack, self._device))
            for at, row in enumerate(scored.rows):
                found[row] = scored.tokens[scored.row_of_token == at].float().cpu()
        return found

    def train(
        self, objective: Objective, on_step: Callable[[int, int], object] = lambda done, total: None
    ) -> TrainingReport:
        """Train the adapter. Raises TrainingFailed; the adapter is then not to be used."""
        options, rows = self.options, objective.rows
        ref = self.logprobs(rows)
        batches = self._batches(rows)
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_share(step, len(batches)))
        health: list[dict[str, float]] = []
        num_tokens = 0
        for number, batch in enumerate(batches):
            tokens, found = self._gradient_step(objective, batch, ref, number)
            torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            num_tokens += tokens
            health.append(found)
            on_step(number + 1, len(batches))
        last_epoch = health[-max(1, len(batches) // options.epochs) :]
        return TrainingReport(len(batches), num_tokens, _means(last_epoch))

    def save(self, folder: Path, probe_prompts: Sequence[TokenIds], card: str) -> None:
        """Write the adapter as a PEFT folder, with its probe and a model card."""
        self.network.save_pretrained(folder)
        write_probe(folder, make_probe(self.network, read_base_network(self._base).fingerprint, probe_prompts))
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _batches(self, rows: Sequence[Row]) -> list[list[int]]:
        """Row indexes of each gradient step: whole trajectories, shuffled anew for each epoch."""
        order = random.Random(self.options.seed)
        trajectories, size = trajectories_of(rows), self.options.trajectories_per_step
        batches = []
        for _ in range(self.options.epochs):
            order.shuffle(trajectories)
            for start in range(0, len(trajectories), size):
                batches.append([row for group in trajectories[start : start + size] for row in group])
        return batches

    def _gradient_step(
        self, objective: Objective, batch: Sequence[int], ref: Sequence[Tensor], number: int
    ) -> tuple[int, dict[str, float]]:
        """Accumulate the gradient of one batch, pack by pack; returns packed tokens and the packs' mean health."""
        rows = [objective.rows[index] for index in batch]
        packs = pack_rows(rows, self._budget(rows))
        health, weight = [], 0.0
        for pack in packs:
            scored = _renumbered(score(self.network, to_batch(pack, self._device)), batch)
            loss = objective.loss(scored, ref)
            if not torch.isfinite(loss.total):
                raise TrainingFailed(
                    f"the {objective.name} loss became {loss.total.item()} at gradient step {number + 1}"
                )
            loss.total.backward()
            weight += loss.weight
            health.append(loss.health)
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                parameter.grad /= max(weight, 1e-9)
        return sum(pack.num_tokens for pack in packs), _means(health)

    def _budget(self, rows: Sequence[Row]) -> int:
        """The token budget, or what one owner's rows need where that is more: they cannot be parted."""
        alone: dict[object, int] = {}
        for row in rows:
            alone[row.owner] = alone.get(row.owner, 0) + len(row.token_ids)
        return max(self.options.token_budget, max(alone.values()))


def fresh_lora(rank: int) -> LoraConfig:
    """A LoRA on every projection; B is zero, so it changes nothing before its first gradient step."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGET_MODULES), task_type="CAUSAL_LM")


def _lr_share(step: int, num_steps: int) -> float:
    warmup = max(1, num_steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def _renumbered(scored: RowLogprobs, batch: Sequence[int]) -> RowLogprobs:
    """Rows by their index in the objective, not in the batch."""
    return replace(scored, rows=tuple(batch[row] for row in scored.rows))


def _means(reports: Sequence[dict[str, float]]) -> dict[str, float]:
    names = {name for report in reports for name in report}
    found = {name: [report[name] for report in reports if name in report] for name in sorted(names)}
    return {name: sum(values) / len(values) for name, values in found.items()}
