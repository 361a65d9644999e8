"""The parts of a running server, wired once by serve.py and handed to the routes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from policies.chat.chat_protocol import ChatProtocol
from policies.types import Engine
from runtime.adapters.approval import Approval
from runtime.adapters.reward_models import RewardModels
from runtime.adapters.swap import Swap
from runtime.agent.budget import RunLimits
from runtime.agent.served_agent import ServedAgent
from runtime.agent.tools import Toolbox
from runtime.http.best_of import ChoosingLimits
from runtime.http.load import Load
from runtime.http.metrics import Metrics
from runtime.http.shutdown import Cutting
from runtime.learning.learning import Learning
from runtime.privacy.erasing import Erasing
from runtime.privacy.redaction import Redactor
from runtime.privacy.retention import Retention
from runtime.store.adapter_registry import AdapterRegistry
from runtime.store.keys import KeyRing
from runtime.store.state_folder import StateFolder
from runtime.store.step_log import StepLog
from tools.shelf import ToolShelf


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything a request needs; holds no state of its own."""

    served_name: str
    """The model name that clients see; it chooses the server's own agent."""
    engine: Engine
    protocol: ChatProtocol
    log: StepLog
    registry: AdapterRegistry
    swap: Swap
    toolbox: Toolbox
    """Of the server's own agent."""
    limits: RunLimits
    metrics: Metrics
    example: str = "Hello! What can you do?"
    """Something a user could ask; the server shows it when it is up."""
    keys: KeyRing = field(default_factory=KeyRing)
    cors_origins: tuple[str, ...] = ()
    """Of web pages that may use this server."""
    cutting: Cutting = field(default_factory=Cutting)
    load: Load = field(default_factory=Load)
    choosing: ChoosingLimits = field(default_factory=ChoosingLimits)
    reward_models: RewardModels | None = None
    """None: no step is chosen by one, as in benchmarks."""
    state: StateFolder | None = None
    """None: nobody else works on it, as in tests."""
    shelf: ToolShelf | None = None
    """Where the tools come from, and what ends them; None: they need no ending."""
    approval: Approval | None = None
    """None: what passes the gate acts at once."""
    learning: Learning | None = None
    """None: a server that only serves, as in benchmarks and tests."""
    redactor: Redactor | None = None
    """None: what is said is logged as it is said."""
    erasing: Erasing | None = None
    """None: nothing can be erased, as in benchmarks."""
    retention: Retention | None = None
    """None: all is kept."""
    named_agents: tuple[ServedAgent, ...] = ()
    worlds: Mapping[str, str] = field(default_factory=dict)
    """By agent, what its world is called; none or empty: it has none."""
    """Beside the server's own; of each name one."""

    @property
    def agents(self) -> tuple[ServedAgent, ...]:
        """All that are served, the server's own first."""
        return (ServedAgent("", self.served_name, self.toolbox), *self.named_agents)

    def agent(self, name: str) -> ServedAgent | None:
        """The agent of this name; empty: the server's own. None: it is not served."""
        return next((agent for agent in self.agents if agent.name == name), None)

    def agent_filter(self, asked: str | None) -> str | None:
        """An agent's name as the stores know it: the server's own agent, called by its model name, has none there."""
        return "" if asked == self.served_name else asked
