"""Dynamic fine-tuning: imitation that does not chase what the policy finds unlikely. A control beside `sft`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from learner.data.training_data import TrainingData
from learner.objectives.losses import dft_loss
from learner.objectives.objectives import Loss
from learner.objectives.states import ActionRewards, labelled_states
from learner.options import ObjectiveOptions
from learner.packing.prefix_tree import ScoredSequence
from learner.packing.scoring import SequenceLogprobs


@dataclass(frozen=True, slots=True)
class DynamicLikelihood:
    """Each token's likelihood, weighed by its own probability."""

    sequences: tuple[ScoredSequence, ...]
    name: str = "dft"
    needs_reference: ClassVar[bool] = False

    def loss(self, scored: SequenceLogprobs, reference: Sequence[Tensor]) -> Loss:
        fit = dft_loss(scored.tokens, scored.weights)
        return Loss(fit.loss, fit.weight, {"perplexity": fit.perplexity})


def dft(
    training_data: TrainingData, options: ObjectiveOptions, discriminator: ActionRewards | None
) -> DynamicLikelihood:
    """Experts' actions by dynamic fine-tuning (arXiv 2508.05629)."""
    return DynamicLikelihood(tuple(each.expert_sequence for each in labelled_states(training_data, options)))
