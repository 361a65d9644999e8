"""Who and what a cycle works with; wired in learner/__main__.py and handed down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from learner.client import Endpoint
from learner.data.experts import Expert
from learner.data.judge import Judge
from policies.chat.chat_protocol import ChatProtocol
from runtime.store.learning_log import LearningLog
from runtime.store.step_log import StepLog
from tools.worlds.world import World


@dataclass(frozen=True, slots=True)
class Collaborators:
    """Everything outside the cycle itself. Options are apart: they say what is done, not with whom."""

    endpoint: Endpoint
    log: StepLog
    learning_log: LearningLog
    protocol: ChatProtocol
    world: World | None
    """Whose tasks judge, and whose expert answers; None: there is none."""
    experts: Sequence[Expert]
    """Whoever may know what to do at the policy's own states; the first who does is believed."""
    base: Path
    """The base model's folder."""
    state: Path
    """The server's state folder; the runtime keeps its adapters there."""
    judge: Judge | None = None
    """A model that ranks own episodes which nobody has judged; None: nobody asked for one."""
    agent: str = ""
    """The agent that learns, by its name; empty: the server's own. What others did or were shown is not for it."""

    def adapter_folder(self, name: str) -> Path:
        return self.state / "adapters" / name
