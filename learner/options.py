"""The options of a learner cycle, each written once: what is collected, learned, trained and judged.

Light to import, so that the command line can be made from them.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

_DOCUMENTED = ConfigDict(use_attribute_docstrings=True)


@dataclass(frozen=True, slots=True, config=_DOCUMENTED)
class CollectionOptions:
    """What is collected."""

    held_out_share: float = 0.2
    """Share of the demonstrations that is kept for the gate and never trained on."""
    max_demonstrations: int = 256
    """Most demonstrations to train on, drawn anew each cycle, and most of those held out."""
    max_own_episodes: int = 256
    """Most of the policy's own episodes; the newest count."""
    replay_share: float = 0.25
    """Share of `max_own_episodes` that is kept for episodes which an earlier cycle has read already."""
    max_versions_old: int = 2
    """What an adapter did that is further behind the acting one is left out."""
    anchors: tuple[str, ...] = ()
    """Ids of episodes, demonstrations and tasks of the world that must not be forgotten: the gate tries them."""
    anchor_share: float = 0.1
    """Share of the own episodes that users were content with (outcome 1) which are anchors too."""
    max_anchors: int = 16
    """Most of those; the newest."""


@dataclass(frozen=True, slots=True, config=_DOCUMENTED)
class ObjectiveOptions:
    """How training data becomes an objective."""

    beta: float = 0.3
    """Of the implicit reward, `implicit` for actions and `eto` for trajectories: smaller lets the policy go further."""
    anchor_weight: float = 1.0
    """Of the likelihood of experts' actions, beside the preferences of `implicit` and the rewards of `inverse` and
    `ppo`."""
    kl_weight: float = 0.02
    """Of the distance from the reference, in `inverse` and `ppo`."""
    clip_low: float = 0.2
    """How far the ratio to the behavior policy may fall before an action stops pushing."""
    clip_high: float = 0.28
    """How far it may rise."""
    own_states: bool = True
    """Also learn the experts' answers at the policy's own logged states, in each episode up to the first slip, and what
    people corrected."""
    informative_only: bool = False
    """In `sft` and `implicit`, leave out states at which no own action disagrees with the expert's."""
    max_versions_old: int = 2
    """What an adapter did that is further behind the acting one is left out."""


@dataclass(frozen=True, slots=True, config=_DOCUMENTED)
class TrainingOptions:
    """How a candidate is trained."""

    lr: float | None = None
    """Peak learning rate of AdamW; warmed up over a tenth of the gradient steps, then cosine to a tenth. Unset: as the
    network's width wants it."""
    epochs: int = 2
    """How often every trajectory is gone through."""
    min_gradient_steps: int = 24
    """Where the epochs make fewer, the trajectories are gone through again until there are so many."""
    trajectories_per_step: int = 4
    """Trajectories whose sequences make one gradient step. Fewer make more steps of the same demonstrations, and
    compute more often what they share, such as tools."""
    rank: int = 16
    """Of a fresh adapter; one that goes on keeps its own."""
    token_budget: int = 4096
    """Most tokens of one packed forward pass: what bounds the memory. A sequence that is longer goes alone."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the base network while it trains. Auto: on a GPU 16 bits; on a CPU 32, or 16 for a real network where they are
    measured to be faster there. The adapter is of 32 bits in any case."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    seed: int = 0
    """Decides the adapter to the byte, on a CPU and without `spare_cores`; a GPU adds up in another order each time."""
    spare_cores: bool = True
    """Train a real network (50 million weights or more) on the cores of a CPU that nobody else uses at the moment."""


@dataclass(frozen=True, slots=True, config=_DOCUMENTED)
class CycleOptions:
    """What a cycle does."""

    objectives: tuple[str, ...] = ("sft_rft",)
    """Each that can be trains a candidate, and the gate chooses: sft_rft, sft, rft, dft, implicit, inverse, pivot, eto,
    ppo. By default experts and own successes are imitated alike, which without outcomes is sft: the best of those
    measured (benchmarks/methods.py)."""
    num_samples: int = 2
    """Actions of the acting policy at each state of a demonstration."""
    gate_tasks: int = 100
    """Validation tasks of the world on which candidates and the acting adapter are compared. 0: demonstrations are
    compared instead, as where there is no world; whole tasks say little of an agent that succeeds at hardly any."""
    canary_share: float = 0.0
    """Share of the new episodes that a candidate which passed the gate serves at first; 0: it acts at once."""
    discriminator: bool = True
    """Train one also where no objective learns from it (`inverse` does): its rewards are logged, and it takes about as
    long as a candidate."""
    implicit_rewards: bool = True
    """Log how much likelier the candidate makes each logged step than the acting adapter: every step that a cycle reads
    goes through the network before and after training, which takes a real network about as long as to train."""
    device: str = "auto"
    """Where it trains: auto, cpu, cuda, cuda:1 ..."""
    collection: CollectionOptions = field(default_factory=CollectionOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
