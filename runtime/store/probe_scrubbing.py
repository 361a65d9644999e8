"""Takes erased prompts out of the probes that lie beside adapters: a probe's prompts are those of states it learned at.

A probe keeps its other prompts, among them a neutral one that holds nobody's words (`learner/training/candidates.py`).
One that loses all of them goes: the adapter serves on where it is loaded, and does not come up again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from policies.adapters.probe import PROBE_FILE, Probe, read_probe, write_probe
from policies.types import TokenIds
from runtime.store.step_log import StepLog, StepLogError

MOST_TIMES = 100
"""So often it begins anew before it gives up."""


def forget_prompts(state: Path, log: StepLog, episode_ids: Sequence[str]) -> int:
    """Take the prompts of these episodes' steps out of all probes of a state folder; how many went.

    It begins anew where a folder has gone meanwhile: adapters move to their place, candidates are cleared away.
    Raises StepLogError where they do so all the time.
    """
    num_forgotten = 0
    for _ in range(MOST_TIMES):
        probes = ProbePrompts(state)
        with suppress(FileNotFoundError):
            probes.read()
            for episode_id in episode_ids:
                probes.forget(log, episode_id)
            return num_forgotten + probes.num_forgotten
        num_forgotten += probes.num_forgotten
    raise StepLogError(f"the adapters and candidates of {state} come and go too fast for their probes to be cleaned")


class ProbePrompts:
    """The prompts of all probes of a state folder."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._probes: dict[Path, Probe] = {}
        self.num_forgotten = 0

    def read(self) -> None:
        """All of them, also those of reward models, which lie within their adapter's folder. Raises
        FileNotFoundError where a folder goes meanwhile."""
        folders = (self._state / "adapters", self._state / "candidates")
        for file in [file for folder in folders for file in folder.rglob(PROBE_FILE)]:
            try:
                self._probes[file.parent] = read_probe(file.parent)
            except FileNotFoundError:
                if not file.is_symlink():  # one that leads nowhere stays so
                    raise
            except (OSError, ValueError):  # no adapter can come up with it
                continue

    def forget(self, log: StepLog, episode_id: str) -> None:
        """Take out those that are the prompt of a step of this episode."""
        lengths = {len(each.prompt_token_ids) for probe in self._probes.values() for each in probe.prompts}
        query = "SELECT id FROM steps WHERE episode_id = ? AND num_prompt_tokens IN (SELECT value FROM json_each(?))"
        for row in log.query(query, episode_id, str(sorted(lengths))):
            try:
                step = log.step(row["id"])
            except StepLogError:  # a damaged row: it goes without
                continue
            if step is not None:
                self._forget(step.prompt_token_ids)

    def _forget(self, prompt: TokenIds) -> None:
        for folder, probe in list(self._probes.items()):
            left = tuple(each for each in probe.prompts if each.prompt_token_ids != prompt)
            if len(left) == len(probe.prompts):
                continue
            self.num_forgotten += len(probe.prompts) - len(left)
            if left:
                self._probes[folder] = replace(probe, prompts=left)
                _write(folder, self._probes[folder])
            else:
                del self._probes[folder]
                (folder / PROBE_FILE).unlink()


def _write(folder: Path, probe: Probe) -> None:
    """In place of the old one, whole or not at all."""
    incoming = folder / ".probe-incoming"
    incoming.mkdir(exist_ok=True)
    write_probe(incoming, probe)
    with (incoming / PROBE_FILE).open("rb") as file:
        os.fsync(file.fileno())
    (incoming / PROBE_FILE).replace(folder / PROBE_FILE)
    incoming.rmdir()
