"""The options of a learner cycle, each written once with its bounds: what is collected, learned, trained and judged.

Light to import, so that the command line can be made from them.
"""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

_DOCUMENTED = ConfigDict(use_attribute_docstrings=True)

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

OBJECTIVE_NAMES = ("sft_rft", "sft", "rft", "dft", "implicit", "inverse", "pivot", "eto", "ppo")
"""Of `learner.objectives.build`, which is slow to import."""


def _known_objectives(names: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := [name for name in names if name not in OBJECTIVE_NAMES]:
        raise ValueError(f"no objective is called {unknown[0]!r}; there are: {', '.join(OBJECTIVE_NAMES)}")
    if not names or len(set(names)) < len(names):
        raise ValueError("name one objective at least, and none twice")
    return names


def _known_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"{name!r} is no device: auto, cpu, cuda, or cuda:1 for the second GPU")
    return name


@dataclass(frozen=True, slots=True, config=_DOCUMENTED)
class CollectionOptions:
    """What is collected."""

    held_out_share: Share = 0.2
    """Share of the demonstrations that is kept for the gate and never trained on."""
    max_demonstrations: AtLeastOne = 256
    """Most demonstrations to train on, drawn anew each cycle, and most of those held out."""
    max_own_episodes: Count = 256
    """Most of the policy's own episodes; the newest count."""
    replay_share: Share = 0.25
    """Share of `max_own_episodes` that is kept for episodes which an earlier cycle has read already; first for those
    of which somebody has said since how they ended."""
    max_versions_old: Count = 2
    """What an adapter did that is further behind the acting one is left out."""
    anchors: tuple[str, ...] = ()
    """Ids of episodes, demonstrations and tasks of the world that must not be forgotten: the gate tries them."""
    anchor_share: Share = 0.1
    """Share of the own episodes that users were content with (outcome 1) which are anchors too."""
    max_anchors: Count = 16
    """Most of those; the newest."""


@dataclass(frozen=True, slots=True, config=_DOCUMENTED)
class ObjectiveOptions:
    """How training data becomes an objective."""

    beta: Positive = 0.3
    """Of the implicit reward, `implicit` for actions and `eto` for trajectories: smaller lets the policy go further."""
    anchor_weight: Weight = 1.0
    """Of the likelihood of experts' actions, beside the preferences of `implicit` and the rewards of `inverse` and
    `ppo`."""
    kl_weight: Weight = 0.02
    """Of the distance from the reference, in `inverse` and `ppo`."""
    clip_low: Share = 0.2
    """How far the ratio to the behavior policy may fall before an action stops pushing."""
    clip_high: Weight = 0.28
    """How far it may rise."""
    own_states: bool = True
    """Also learn the experts' answers at the policy's own logged states, in each episode up to the first slip, and what
    people corrected."""
    informative_only: bool = False
    """In `sft` and `implicit`, leave out states at which no own action disagrees with the expert's."""
    max_success_length: Positive = 1.5
    """Own successes of more steps than so many times the longest demonstration's are not imitated by `sft_rft`: they
    got there on detours."""
    max_versions_old: Count = 2
    """What an adapter did that is further behind the acting one is left out."""


@dataclass(frozen=True, slots=True, config=_DOCUMENTED)
class TrainingOptions:
    """How a candidate is trained."""

    lr: Positive | None = None
    """Peak learning rate of AdamW; warmed up over a tenth of the gradient steps, then cosine to a tenth. Unset: as the
    network's width wants it."""
    epochs: Count = 2
    """How often every trajectory is gone through."""
    min_gradient_steps: Count = 24
    """Where the epochs make fewer, the trajectories are gone through again until there are so many."""
    trajectories_per_step: AtLeastOne = 4
    """Trajectories whose sequences make one gradient step. Fewer make more steps of the same demonstrations, and
    compute more often what they share, such as tools."""
    rank: AtLeastOne = 16
    """Of a fresh adapter; one that goes on keeps its own."""
    token_budget: AtLeastOne = 4096
    """Most tokens of one packed forward pass: what bounds the memory. Beside a sequence that is longer than half of it
    there is room for half of it, for others that begin alike."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the base network while it trains. Auto: on a GPU 16 bits; on a CPU 32, or 16 for a real network where they are
    measured to be faster there. The adapter is of 32 bits in any case."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    seed: Annotated[int, Field(ge=0, le=2**31)] = 0
    """Decides the adapter to the byte, on a CPU and without `spare_cores`; a GPU adds up in another order each time."""
    spare_cores: bool = True
    """Train a real network (50 million weights or more) on the cores of a CPU that nobody else uses at the moment."""

    @model_validator(mode="after")
    def _trains(self) -> TrainingOptions:
        if not self.epochs and not self.min_gradient_steps:
            raise ValueError(
                "epochs and min_gradient_steps are both 0: nothing would be trained; one must be 1 at least"
            )
        return self


@dataclass(frozen=True, slots=True, config=_DOCUMENTED)
class CycleOptions:
    """What a cycle does."""

    objectives: Annotated[tuple[str, ...], AfterValidator(_known_objectives)] = ("sft_rft",)
    """Each that can be trains a candidate, and the gate chooses: sft_rft, sft, rft, dft, implicit, inverse, pivot, eto,
    ppo. By default experts and own successes are imitated alike, which without outcomes is sft: the best of those
    measured (benchmarks/methods.py)."""
    num_samples: Count = 2
    """Actions of the acting policy at each state of a demonstration; 0: none are drawn."""
    gate_tasks: Count = 100
    """Validation tasks of the world on which candidates and the acting adapter are compared. 0: demonstrations are
    compared instead, as where there is no world; whole tasks say little of an agent that succeeds at hardly any."""
    canary_share: Share = 0.0
    """Share of the new episodes that a candidate which passed the gate serves at first; 0: it acts at once."""
    discriminator: bool = True
    """Train one also where no objective learns from it (`inverse` does): its rewards are logged, and it takes about as
    long as a candidate."""
    implicit_rewards: bool = True
    """Log how much likelier the candidate makes each logged step than the acting adapter: every step that a cycle reads
    goes through the network before and after training, which takes a real network about as long as to train."""
    device: Annotated[str, AfterValidator(_known_device)] = "auto"
    """Where it trains: auto, cpu, cuda, cuda:1 ..."""
    collection: CollectionOptions = field(default_factory=CollectionOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
