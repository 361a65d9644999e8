"""The methods that are compared: an objective of the learner, its settings, and what it is given to learn from.

Every method begins with one cycle of `sft`; what is told here is what its later cycles do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from learner.options import ObjectiveOptions

OPTIONS = ObjectiveOptions(
    beta=0.3,
    anchor_weight=1.0,
    kl_weight=0.02,
    clip_low=0.2,
    clip_high=0.28,
    own_states=False,
    informative_only=False,
    max_success_length=1000.0,
    max_versions_old=2,
)
"""Written out, so that the runs do not change with the learner's defaults."""


class Takes(StrEnum):
    """What a method learns from beside the demonstrations."""

    OUTCOMES = "outcomes"  # of own episodes, 1 or 0
    ANSWERS = "answers"  # an expert's at every state of own episodes, as many a cycle as there are demonstrations
    TRAFFIC = "traffic"  # own episodes that nobody judged or answered
    REPLAY = "replay"  # outcomes, and a world in which own episodes can be resumed at any state


class Samples(StrEnum):
    """Where the policy is sampled."""

    NONE = "none"
    FOLDS = "folds"  # at demonstrations, each by a policy that was trained on the other half
    OWN_STATES = "own states"  # at those that an expert answers at, or that nobody answers at
    BOTH = "folds and own states"


class Labels(StrEnum):
    """Where the answers at own states come from."""

    EXPERT = "expert"
    CONFIRMED = "confirmed"  # the expert, where one of the policy's samples agrees
    TO_SLIP = "to the first slip"  # the expert, up to the state where the policy first does otherwise
    CRITICAL = "critical"  # an own sample that, played in place of a failed episode's step, led to success


@dataclass(frozen=True, slots=True)
class Method:
    """An objective, its settings, and what it is given."""

    objective: str
    """Of the learner; `experience, sft`, `majority`, `raft` and `sft_rft, majority` are the benchmark's own, and with
    `none` the student stays as it is."""
    takes: tuple[Takes, ...] = ()
    samples: Samples = Samples.NONE
    labels: Labels = Labels.EXPERT
    lr: float = 4e-3
    """Of a network as narrow as the students'."""
    trajectories_per_step: int = 2
    objectives: ObjectiveOptions = OPTIONS
    num_sampled: int = 44
    """Own episodes of a cycle at whose states it is sampled, at most."""
    at_once: bool = False
    """The method's first cycle too is its own, not `sft`'s."""

    @property
    def has_labels(self) -> bool:
        return Takes.ANSWERS in self.takes or self.labels is Labels.CRITICAL

    @property
    def samples_silent_states(self) -> bool:
        """Those that nobody answers at."""
        return self.samples in (Samples.OWN_STATES, Samples.BOTH) and not self.has_labels

    @property
    def objective_options(self) -> ObjectiveOptions:
        return replace(self.objectives, own_states=self.has_labels)


def _with(method: Method, **changes: float) -> Method:
    return replace(method, objectives=replace(method.objectives, **changes))


CONTROL = "sft continued"
DEFAULT = "rft + sft"
"""The learner's default (`CycleOptions.objectives`)."""
OWN_SUCCESSES = Method("sft_rft", (Takes.OUTCOMES,))
ANSWERED = Method("sft", (Takes.ANSWERS,))
IMPLICIT_OWN = Method("implicit", (Takes.ANSWERS,))
IMPLICIT_FOLDS = Method("implicit", samples=Samples.FOLDS)
MAJORITY = Method("majority", (Takes.TRAFFIC,), Samples.OWN_STATES)
METHODS: dict[str, Method] = {
    "untrained": Method("none"),
    CONTROL: Method("sft"),
    DEFAULT: _with(OWN_SUCCESSES, max_success_length=1.5),
    "rft + sft, of any length": OWN_SUCCESSES,
    "majority": MAJORITY,
    "majority, 16 episodes": replace(MAJORITY, num_sampled=16),
    "rft + sft + majority": Method("sft_rft, majority", (Takes.OUTCOMES,), Samples.OWN_STATES),
    "sft, expert at own states": ANSWERED,
    "implicit, folds": IMPLICIT_FOLDS,
    "reward as teacher": Method("raft", (Takes.TRAFFIC,), Samples.BOTH),
    "rft": Method("rft", (Takes.OUTCOMES,)),
    "rft + sft from cycle 1": Method("sft_rft", (Takes.OUTCOMES,), at_once=True),
    "implicit, expert at own states": IMPLICIT_OWN,
    "pivot, expert at own states": Method("pivot", (Takes.ANSWERS,), Samples.OWN_STATES),
    "sft, expert at own states, confirmed": replace(ANSWERED, samples=Samples.OWN_STATES, labels=Labels.CONFIRMED),
    "sft, expert up to the first slip": replace(ANSWERED, labels=Labels.TO_SLIP),
    "implicit, expert up to the first slip": replace(IMPLICIT_OWN, labels=Labels.TO_SLIP),
    "rft + sft, expert up to the first slip": Method("sft_rft", (Takes.OUTCOMES, Takes.ANSWERS), labels=Labels.TO_SLIP),
    "rft + sft, expert at own states": Method("sft_rft", (Takes.OUTCOMES, Takes.ANSWERS)),
    "critical steps": Method("sft", (Takes.REPLAY,), Samples.OWN_STATES, Labels.CRITICAL),
    "rft + sft, critical steps": Method("sft_rft", (Takes.OUTCOMES, Takes.REPLAY), Samples.OWN_STATES, Labels.CRITICAL),
    "dft": Method("dft"),
    "implicit, folds, beta 0.1": _with(IMPLICIT_FOLDS, beta=0.1),
    "implicit, folds, beta 1": _with(IMPLICIT_FOLDS, beta=1.0),
    "pivot, folds": Method("pivot", samples=Samples.FOLDS),
    "inverse, folds": Method("inverse", (Takes.TRAFFIC,), Samples.FOLDS),
    "experience, then sft": Method("experience, sft", (Takes.TRAFFIC,)),
}
"""By name."""
