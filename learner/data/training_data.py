"""What a cycle learns from: states in tokens, with what an expert does there and what the policy did.

Neither the log nor messages are known here. Whoever gathers the training data (a cycle from the log, a benchmark from
its own rollouts) hands it to `learner/objectives/build.py`, which makes objectives of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from policies.types import TokenIds

NO_ANCESTOR = 1_000_000
"""As a number of versions: of a policy that the acting one does not stem from."""


@dataclass(frozen=True, slots=True)
class PolicyAction:
    """An action that a policy of ours chose at a state."""

    step_id: str
    """The logged step."""
    token_ids: TokenIds
    behavior_logprobs: tuple[float, ...]
    """Of each token, under the policy that sampled it. Empty where it was drawn otherwise (another temperature, top-p,
    a grammar): how likely that was is not known, and no policy gradient takes it."""
    agrees: bool | None
    """Whether it means what the expert's action does; None where no expert has answered."""
    num_versions_old: int = 0
    """How many versions its policy is behind the acting one."""
    is_malformed: bool = False
    """Nobody could read it as an answer or as calls of tools."""


@dataclass(frozen=True, slots=True)
class State:
    """A point of a trajectory where somebody acted."""

    id: str
    """Of the logged step that was taken here."""
    prompt: TokenIds
    expert: TokenIds | None
    """The expert's action in tokens; None where no expert has answered."""
    policy_actions: tuple[PolicyAction, ...]
    """At an own state the first is the one that was taken, and led to what follows; others were sampled there."""
    is_correction: bool = False
    """A person said of this very step what should have been done."""

    @property
    def is_slip(self) -> bool:
        """At an own state: what was done there is not what the expert would have done."""
        return bool(self.policy_actions) and self.policy_actions[0].agrees is False

    @property
    def disagreeing(self) -> tuple[PolicyAction, ...]:
        """Own actions that an expert would not have chosen."""
        return tuple(action for action in self.policy_actions if action.agrees is False)

    @property
    def is_informative(self) -> bool:
        """An expert has answered, and some own action disagrees."""
        return self.expert is not None and bool(self.disagreeing)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The states of one episode, in order."""

    episode_id: str
    states: tuple[State, ...]
    task: str | None = None
    outcome: float | None = None
    """1 success, 0 failure; None where nobody said. Of demonstrations: 1."""
    is_demonstration: bool = False
    """Its steps are an expert's: the logged step at each state is `expert`."""


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Everything one cycle learns from."""

    demonstrations: tuple[Trajectory, ...]
    """Experts' episodes; own actions there are samples of the acting policy (inspection)."""
    policy_episodes: tuple[Trajectory, ...] = ()
    """The policy's own logged episodes; each state has the action taken, and an expert's where one answered."""
    held_out: tuple[Trajectory, ...] = ()
    """Episodes of either kind that are kept for the gate, anchors too, and own lines beside the main one: their steps
    are rewarded, and never learned from."""

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """What is learned from."""
        return self.demonstrations + self.policy_episodes

    def without(self, episodes: Collection[str]) -> TrainingData:
        """The same without the trajectories of these episodes."""
        demonstrations, policy_episodes = (
            tuple(trajectory for trajectory in side if trajectory.episode_id not in episodes)
            for side in (self.demonstrations, self.policy_episodes)
        )
        return TrainingData(demonstrations, policy_episodes)
