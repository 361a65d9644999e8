"""A reward model beside an adapter: what tells experts' actions from the policy's, to choose among draws with.

It is a LoRA q on the same base network, a plain PEFT folder with a probe, in the adapter's folder under `reward/`. Its
logit of an action is 0.5 (log q - log base) + bias: AIRL's form (arXiv 1710.11248), as `learner/training/discriminator`
trains it. So whoever can tell the log probabilities of a given text under an adapter can judge by it: no head, no
second network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

REWARD_FOLDER = "reward"
"""Within an adapter's folder."""
REWARD_FILE = "reward.json"
"""Within the reward model's."""


@dataclass(frozen=True, slots=True)
class RewardCard:
    """What a reward model's maker says of it; the content of `reward.json`."""

    bias: float
    """Added to the logit; it makes zero the middle between experts' actions and the policy's."""
    accuracy: float | None
    """Share of held-out pairs, an expert's action and a wrong one at the same state, that it ranks rightly: the area
    under the ROC curve at one state. None where no pair was held out."""
    num_pairs: int
    """That it was trained on."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.bias):
            raise ValueError(f"{self.bias} is no bias")


def write_reward_card(folder: Path, card: RewardCard) -> None:
    (folder / REWARD_FILE).write_text(json.dumps(asdict(card)), encoding="utf-8")


def read_reward_card(folder: Path) -> RewardCard:
    """Raises FileNotFoundError, or ValueError with what is wrong in it."""
    try:
        content = json.loads((folder / REWARD_FILE).read_text(encoding="utf-8"))
        accuracy = content["accuracy"]
        return RewardCard(
            float(content["bias"]), None if accuracy is None else float(accuracy), int(content["num_pairs"])
        )
    except KeyError as error:
        raise ValueError(f"{REWARD_FILE} lacks {error}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{REWARD_FILE} cannot be read: {error}") from error


def expert_logit(logprobs: Sequence[float], base_logprobs: Sequence[float], bias: float) -> float:
    """Of an action, by the log probabilities of its tokens under the reward model and under the base network; above
    zero where it is nearer to the experts' actions than to the policy's."""
    return 0.5 * (sum(logprobs) - sum(base_logprobs)) + bias
