"""python -m learner verify: reads a whole state folder and says what is wrong with it; no server is needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from learner.commands.server import ServerOptions, has_state
from policies.adapters.files import AdapterRefused, weights_digest
from runtime.store.adapter_registry import AdapterRegistry, AdapterState
from runtime.store.step_log import StepLog, StepLogError


class VerifyOptions(ServerOptions):
    """Check a state folder: every step rebuilds to what was served, every adapter's files are those registered."""


def run(options: VerifyOptions) -> int:
    """Exit code 1 where anything is wrong, or where there is nothing to check."""
    if not has_state(options):
        return 1
    problems = [*_log_problems(options.state), *_adapter_problems(options.state)]
    print("\n".join(problems) if problems else f"{options.state} is sound")
    return 1 if problems else 0


def _log_problems(state: Path) -> list[str]:
    try:
        log = StepLog(state / "agent.db", read_only=True)
    except StepLogError as error:
        return [str(error)]
    try:
        return log.verify()
    finally:
        log.close()


def _adapter_problems(state: Path) -> Iterator[str]:
    registry = AdapterRegistry(state / "agent.db")
    try:
        for adapter in registry.adapters():
            if registry.state(adapter.name) is AdapterState.REFUSED:
                continue  # it never acts: its files may go
            try:
                if weights_digest(adapter.path) != adapter.digest:
                    yield f"{adapter.path}: its weights are not those that were registered"
            except (AdapterRefused, OSError) as error:
                yield f"{adapter.path}: {error}"
    finally:
        registry.close()
