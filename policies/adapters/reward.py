"""A reward model beside an adapter: what tells experts' actions from the policy's, to choose among draws with.

It is a LoRA q on the same base network, a plain PEFT folder with a probe, in the adapter's folder under `reward/`. Its
logit of an action is 0.5 (log q - log base), AIRL's form (arXiv 1710.11248), as `learner/training/discriminator` trains
it. So whoever can tell the log probabilities of a given text under an adapter can judge by it: no head, no second
network.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

REWARD_FOLDER = "reward"
"""Within an adapter's folder."""
REWARD_FILE = "reward.json"
"""Within the reward model's."""
LOGIT_WEIGHT = 0.25
"""Of the logit beside the policy's own log probability; of 0.25, 0.5, 1 and 2 the best on validation tasks
of the order desk and multihop_qa, and not of babyai (benchmarks/RESULTS.md)."""


@dataclass(frozen=True, slots=True)
class RewardCard:
    """What a reward model's maker says of it; the content of `reward.json`."""

    accuracy: float | None
    """Share of held-out pairs, an expert's action and a wrong one at the same state, that it ranks rightly: the area
    under the ROC curve at one state. None where no pair was held out."""
    num_pairs: int
    """That it was trained on."""


def write_reward_card(folder: Path, card: RewardCard) -> None:
    (folder / REWARD_FILE).write_text(json.dumps(asdict(card)), encoding="utf-8")


def read_reward_card(folder: Path) -> RewardCard:
    """Raises FileNotFoundError, or ValueError with what is wrong in it."""
    try:
        content = json.loads((folder / REWARD_FILE).read_text(encoding="utf-8"))
        accuracy = content["accuracy"]
        return RewardCard(None if accuracy is None else float(accuracy), int(content["num_pairs"]))
    except KeyError as error:
        raise ValueError(f"{REWARD_FILE} lacks {error}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{REWARD_FILE} cannot be read: {error}") from error


def expert_likelihood(
    policy_logprobs: Sequence[float], reward_logprobs: Sequence[float], base_logprobs: Sequence[float]
) -> float:
    """How likely an expert would do what the policy has drawn, in nats a token up to a constant: log pi plus
    `LOGIT_WEIGHT` times the logit, by the log probabilities of its tokens, all [t], t at least 1.

    The logit estimates log p_expert / pi (tests/test_losses.py), so alone it likes best what the policy hardly ever
    does; with log pi it is the expert's own likelihood. Moving a policy by the ratio of two others, token by token, at
    a weight, is DExperts' way (arXiv 2105.03023, eq. 2).
    """
    logit = 0.5 * (sum(reward_logprobs) - sum(base_logprobs))
    return (sum(policy_logprobs) + LOGIT_WEIGHT * logit) / len(policy_logprobs)
