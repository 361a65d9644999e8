"""Trains a LoRA on an objective, packed, and leaves it as a plain PEFT folder with its proof beside it.

A trainer begins where the acting adapter is (or with a fresh one on the base). It keeps no optimizer state between
cycles: a cycle is short, and moments of other data are no help. The reference needs no second copy of the network:
its logprobs are taken once, before the first gradient step.

Memory is bounded by the token budget of a forward pass: a gradient step accumulates over as many packs as it takes,
and sequences of one owner that pass the budget together go through the network in parts (GradCache, arXiv 2101.06983).
Where memory runs out all the same, the budget is halved and the gradient step begins anew.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM

from learner.objectives.objectives import Loss, Objective, trajectories_of
from learner.options import TrainingOptions
from learner.packing.prefix_tree import Pack, ScoredSequence, num_packed_tokens, pack_sequences
from learner.packing.scoring import SequenceLogprobs, reference, score, to_batch
from learner.packing.tree_attention import TREE_ATTENTION
from learner.training.activation_memory import fits, layers_computed_again
from learner.training.adapter_writer import whole_folder
from learner.training.freed_memory import hand_back_freed_memory
from learner.training.model_card import Origin, model_card
from learner.training.precision import MIN_WEIGHTS, num_weights, training_dtype
from learner.training.probing import make_probe
from learner.training.spare_cores import SpareCores
from policies.adapters.base_network import read_base_network
from policies.adapters.probe import Probe, write_probe
from policies.types import TokenIds

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

ALONE = 1
"""The token budget with which each sequence goes by itself."""

T = TypeVar("T")


class TrainingFailed(Exception):
    """Training came to nothing: a loss that is not a number, no memory, no room on the disk; the message says where
    and, where something can be done about it, what to change."""


def lr_for(hidden_size: int) -> float:
    """The peak learning rate of a LoRA on a network of this width: 5e-4 (2000 / width)^0.781.

    The fit of "LoRA Without Regret" (Schulman et al., Thinking Machines, 2025) for Llama: 4e-4 at a width of 2560. At
    the novice's 128 it gives 4.3e-3; tuning on validation tasks found 4e-3 (benchmarks/methods.py).
    """
    return 5e-4 * (2000 / hidden_size) ** 0.781


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """How training went."""

    num_gradient_steps: int
    num_tokens: int
    """Packed tokens that went forward and backward."""
    diagnostics: dict[str, float]
    """Means over the last epoch."""
    token_budget: int
    """What was asked for, or what is left of it after memory ran out."""


class Trainer:
    """One candidate in the making."""

    def __init__(
        self,
        base: Path,
        adapter: Path | None,
        options: TrainingOptions,
        device: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        """`adapter` is the acting adapter's folder; None begins with a fresh LoRA that changes nothing yet.

        `device` is a torch device, or `auto`: a GPU if there is one. `dtype` is the base network's; None is as
        `options.precision` says. The adapter is trained and saved in float32 in any case.
        """
        self.options = options
        self._base, self._parent = base, adapter
        # Read before training: what is trained must not be lost at its end because memory has become short.
        self._base_fingerprint = read_base_network(base).fingerprint
        self._device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._token_budget = options.token_budget
        may_take_cores = options.spare_cores and self._device == "cpu" and num_weights(base) >= MIN_WEIGHTS
        self._cores = SpareCores.of_this_machine() if may_take_cores else None
        self._origin: Origin | None = None
        torch.manual_seed(options.seed)
        dtype = dtype or training_dtype(base, options.precision, self._device)
        network: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation=TREE_ATTENTION)
        network.to(self._device)
        # PEFT makes adapter weights float32 over a half-precision base and casts at their door: no autocast is needed.
        self.network: Any = (
            PeftModel.from_pretrained(network, str(adapter), is_trainable=True)
            if adapter
            else get_peft_model(network, fresh_lora(options.rank))
        )
        self.network.eval()  # no dropout: a packed pass must score what the engine would

    # ---------------------------------------------------------------------------------------------- scoring

    def logprobs(self, sequences: Sequence[ScoredSequence], is_base: bool = False) -> list[Tensor]:
        """Token logprobs of each sequence's scored tokens, without gradient: of the network as it is now, or of its
        base.

        Raises TrainingFailed where there is not even memory for the longest sequence, and where one is no number: then
        the weights are too large for what they are to compute.
        """
        found = self._within_memory(sequences, lambda: self._logprobs(sequences, is_base))
        for logprobs in found:
            _require_finite(logprobs, "the log probability of an action", "where it is only read")
        return found

    def _logprobs(self, sequences: Sequence[ScoredSequence], is_base: bool) -> list[Tensor]:
        found: list[Tensor] = [torch.empty(0)] * len(sequences)
        for pack in self._packs_of_sequences(sequences):
            with torch.no_grad():
                if is_base:
                    with reference(self.network):
                        scored = self._score(pack)
                else:
                    scored = self._score(pack)
            for at, sequence in enumerate(scored.sequences):
                found[sequence] = scored.tokens[scored.sequence_of_token == at].float().cpu()
        return found

    def _score(self, pack: Pack) -> SequenceLogprobs:
        if self._cores:
            self._cores.take()
        batch = to_batch(pack, self._device)
        if not torch.is_grad_enabled() or fits(self.network.config, pack.num_tokens, self.network.device):
            return score(self.network, batch)
        with layers_computed_again(self.network):
            return score(self.network, batch)

    def _packs_of_sequences(self, sequences: Sequence[ScoredSequence]) -> list[Pack]:
        """Packs within the budget, without regard to owners."""
        parted = [replace(sequence, owner=index) for index, sequence in enumerate(sequences)]
        return pack_sequences(parted, self._budget(sequences))

    def _budget(self, sequences: Sequence[ScoredSequence]) -> int:
        """The token budget, or half of it beside the longest sequence, which cannot be parted: most of that may be a
        prompt that the others begin with too, and is computed once a pack."""
        longest = max(len(sequence.token_ids) for sequence in sequences)
        return max(self._token_budget, longest + self._token_budget // 2)

    # --------------------------------------------------------------------------------------------- training

    def train(
        self, objective: Objective, on_step: Callable[[int, int], object] = lambda done, total: None
    ) -> TrainingReport:
        """Train the adapter. Raises TrainingFailed; the adapter is then not to be used."""
        options, sequences = self.options, objective.sequences
        ref = self.logprobs(sequences) if objective.needs_reference else []
        batches = self._batches(sequences)
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        lr = lr_for(self.network.config.get_text_config().hidden_size) if options.lr is None else options.lr
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_share(step, len(batches)))
        diagnostics: list[dict[str, float]] = []
        num_tokens = 0
        for number, batch in enumerate(batches):
            tokens, found = self._gradient(objective, batch, ref, f"at gradient step {number + 1}")
            norm = torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
            _require_finite(norm, f"the gradient of the {objective.name} loss", f"at gradient step {number + 1}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            num_tokens += tokens
            diagnostics.append(found)
            on_step(number + 1, len(batches))
        steps_an_epoch = -(-len(trajectories_of(sequences)) // options.trajectories_per_step)
        last_epoch = _means(diagnostics[-steps_an_epoch:])
        self._origin = self._origin_of(objective, len(batches), last_epoch)
        return TrainingReport(len(batches), num_tokens, last_epoch, self._token_budget)

    def _batches(self, sequences: Sequence[ScoredSequence]) -> list[list[int]]:
        """Row indexes of each gradient step: whole trajectories, shuffled anew for each epoch."""
        order = random.Random(self.options.seed)
        trajectories, size = trajectories_of(sequences), self.options.trajectories_per_step
        num_steps = max(self.options.epochs * -(-len(trajectories) // size), self.options.min_gradient_steps)
        batches = list[list[int]]()
        while len(batches) < num_steps:
            order.shuffle(trajectories)
            for start in range(0, len(trajectories), size):
                batches.append([sequence for group in trajectories[start : start + size] for sequence in group])
        return batches[:num_steps]

    def _gradient(
        self, objective: Objective, batch: Sequence[int], ref: Sequence[Tensor], place: str
    ) -> tuple[int, dict[str, float]]:
        """The mean gradient of one batch, left on the parameters; returns packed tokens and the packs' mean
        diagnostics."""

        def accumulate() -> tuple[int, list[Loss]]:
            self.network.zero_grad(set_to_none=True)  # what an attempt left that ran out of memory
            return self._accumulate(objective, batch, ref, place)

        num_tokens, losses = self._within_memory([objective.sequences[index] for index in batch], accumulate)
        weight = sum(loss.weight for loss in losses)
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                parameter.grad /= max(weight, 1e-9)
        return num_tokens, _means([loss.diagnostics for loss in losses])

    def _accumulate(
        self, objective: Objective, batch: Sequence[int], ref: Sequence[Tensor], place: str
    ) -> tuple[int, list[Loss]]:
        """Add up the gradient of a batch, pack by pack; returns packed tokens, and each pack's loss."""
        sequences = objective.sequences
        budget = self._budget([sequences[index] for index in batch])
        fitting, too_large = _parted_by_size(sequences, batch, budget)
        num_tokens, losses = 0, []
        for pack in pack_sequences([sequences[index] for index in fitting], budget):
            loss = objective.loss(_renumbered(self._score(pack), fitting), ref)
            _require_finite(loss.total, f"the {objective.name} loss", place)
            loss.total.backward()
            losses.append(replace(loss, total=loss.total.detach()))  # else its graph would outlive the pack
            num_tokens += pack.num_tokens
        for owned in too_large:
            loss, tokens = self._backward_in_parts(objective, owned, ref, place)
            losses.append(loss)
            num_tokens += tokens
        return num_tokens, losses

    def _backward_in_parts(
        self, objective: Objective, owned: Sequence[int], ref: Sequence[Tensor], place: str
    ) -> tuple[Loss, int]:
        """Backward through sequences that belong together and do not fit the budget together.

        First without gradient: their logprobs, and the loss's gradient at them. Then pack by pack through the network.
        """
        sequences = [objective.sequences[index] for index in owned]
        tokens = [sequence.to(self._device).requires_grad_() for sequence in self._logprobs(sequences, is_base=False)]
        loss = objective.loss(_joined(tokens, sequences, owned), ref)
        _require_finite(loss.total, f"the {objective.name} loss", place)
        gradients = torch.autograd.grad(loss.total, tokens)
        packs = self._packs_of_sequences(sequences)
        for pack in packs:
            scored = self._score(pack)
            scored.tokens.backward(torch.cat([gradients[sequence] for sequence in scored.sequences]))
        return replace(loss, total=loss.total.detach()), sum(pack.num_tokens for pack in packs)

    def _within_memory(self, sequences: Sequence[ScoredSequence], attempt: Callable[[], T]) -> T:
        """Try; where memory runs out, again with half the token budget, as long as that can make packs smaller."""
        while True:
            try:
                return attempt()
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
            # Out here the error is gone, and with it all that its traceback held.
            longest = max(len(sequence.token_ids) for sequence in sequences)
            if self._token_budget <= ALONE:
                raise TrainingFailed(
                    f"not enough memory on {self._device} for a pass over {longest} tokens, the longest sequence "
                    "of the batch: leave longer episodes out, use a device with more memory, or take a smaller base"
                )
            self._token_budget = self._token_budget // 2 if self._token_budget > longest else ALONE
            self.network.zero_grad(set_to_none=True)
            hand_back_freed_memory()

    # ----------------------------------------------------------------------------------------------- saving

    def save(
        self, folder: Path, probe_prompts: Sequence[TokenIds], card: str, neutral_prompt: TokenIds | None = None
    ) -> None:
        """Write the adapter as a PEFT folder, with its probe and a model card that begins with `card`.

        The probe keeps those of its prompts at which the adapter is furthest from its base, and the neutral one.

        The folder is there whole or not at all. Raises TrainingFailed where its weights are not finite or it cannot be
        written, FileExistsError where the folder holds something already.
        """
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                _require_finite(parameter, f"the adapter's {name}", "at the end of training")
        probe = (
            None
            if self._is_half_on_cpu
            else make_probe(self.network, self._base_fingerprint, probe_prompts, neutral_prompt)
        )
        try:
            with whole_folder(folder) as incoming:
                self.network.save_pretrained(incoming, save_embedding_layers=False)
                write_probe(incoming, probe or self._probe_in_32_bits(incoming, probe_prompts, neutral_prompt))
                (incoming / "README.md").write_text(model_card(card, self._origin), encoding="utf-8")
        except FileExistsError:
            raise
        except (OSError, SafetensorError) as error:
            raise TrainingFailed(f"the adapter could not be written to {folder}: {error}; make room there") from error

    @property
    def _is_half_on_cpu(self) -> bool:
        return self._device == "cpu" and self.network.dtype != torch.float32

    def _probe_in_32_bits(self, adapter: Path, prompts: Sequence[TokenIds], neutral: TokenIds | None) -> Probe:
        """What a CPU's engine will compute with what was saved, since it keeps 32 bits where the training took 16.

        The network is what was saved from then on: there may be no memory for both.
        """
        self.network = None
        gc.collect()
        network = AutoModelForCausalLM.from_pretrained(
            self._base, dtype=torch.float32, attn_implementation=TREE_ATTENTION
        )
        self.network = PeftModel.from_pretrained(network, str(adapter)).eval()
        return make_probe(self.network, self._base_fingerprint, prompts, neutral)

    def _origin_of(self, objective: Objective, num_gradient_steps: int, diagnostics: dict[str, float]) -> Origin:
        return Origin(
            base=str(self._base),
            base_fingerprint=self._base_fingerprint,
            parent=self._parent.name if self._parent else None,
            objective=objective.name,
            num_trajectories=len(trajectories_of(objective.sequences)),
            num_sequences=len(objective.sequences),
            num_gradient_steps=num_gradient_steps,
            seed=self.options.seed,
            diagnostics=diagnostics,
        )


def fresh_lora(rank: int) -> LoraConfig:
    """A LoRA on every projection; B is zero, so it changes nothing before its first gradient step."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGET_MODULES), task_type="CAUSAL_LM")


def _lr_share(step: int, num_steps: int) -> float:
    warmup = max(1, num_steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


# ------------------------------------------------------------------------------------------------ sequences and packs


def _parted_by_size(
    sequences: Sequence[ScoredSequence], batch: Sequence[int], budget: int
) -> tuple[list[int], list[list[int]]]:
    """Indexes whose owners' sequences fit the budget, and those of each owner whose sequences do not."""
    by_owner: dict[Hashable, list[int]] = {}
    for index in batch:
        by_owner.setdefault(sequences[index].owner, []).append(index)
    fits = {owner: num_packed_tokens([sequences[i] for i in owned]) <= budget for owner, owned in by_owner.items()}
    return [i for i in batch if fits[sequences[i].owner]], [
        owned for owner, owned in by_owner.items() if not fits[owner]
    ]


def _renumbered(scored: SequenceLogprobs, batch: Sequence[int]) -> SequenceLogprobs:
    """Rows by their index in the objective, not in the batch."""
    return replace(scored, sequences=tuple(batch[sequence] for sequence in scored.sequences))


def _joined(tokens: Sequence[Tensor], sequences: Sequence[ScoredSequence], indexes: Sequence[int]) -> SequenceLogprobs:
    """Token logprobs of sequences as one pack of them would give."""
    lengths = torch.tensor([len(sequence) for sequence in tokens])
    weights = [span.weight for sequence in sequences for span in sequence.spans for _ in range(span.start, span.stop)]
    sequence_of_token = torch.arange(len(sequences)).repeat_interleave(lengths).to(tokens[0].device)
    return SequenceLogprobs(
        tuple(indexes), torch.cat(list(tokens)), sequence_of_token, torch.tensor(weights).to(tokens[0])
    )


# ------------------------------------------------------------------------------------------------ what goes wrong


def _require_finite(value: Tensor, what: str, place: str) -> None:
    if not torch.isfinite(value).all():
        became = f"became {value.item()}" if value.numel() == 1 else "has values that are not finite"
        raise TrainingFailed(f"{what} {became} {place}: take a smaller learning rate, or look at the data")


def _is_out_of_memory(error: Exception) -> bool:
    """CUDA has an error of its own for it, NumPy Python's; the CPU allocator of torch only says so, in two ways."""
    says_so = ("can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in says_so)


def _means(reports: Sequence[dict[str, float]]) -> dict[str, float]:
    names = {name for report in reports for name in report}
    found = {name: [report[name] for report in reports if name in report] for name in sorted(names)}
    return {name: sum(values) / len(values) for name, values in found.items()}
