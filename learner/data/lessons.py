"""Notes what taught what, before it teaches: an erasure has to know which cycle and which adapter used an episode.

The note comes first and the look for tombstones after it. So an episode that is erased meanwhile is either seen here,
or whoever erases it finds the note.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from learner.data.collaborators import Collaborators
from learner.data.training_data import TrainingData
from policies.adapters.files import weights_digest
from runtime.store.learning_log import LessonRole
from runtime.store.step_log import StepLog

if TYPE_CHECKING:
    from learner.data.collect import Collected
    from learner.report import CycleRecord


class LessonErased(Exception):
    """An episode that the cycle learns from was erased meanwhile, and which."""


def note_reading(record: CycleRecord, who: Collaborators, collected: Collected) -> None:
    """Note what a cycle reads, whatever becomes of it. Raises LessonErased."""
    episodes = [each.episode.id for each in collected.read]
    tried = [each.episode.id for each in (*collected.held_out, *collected.own_held_out, *collected.anchors)]
    roles = {
        LessonRole.DEMONSTRATION: [each.episode.id for each in collected.demonstrations],
        LessonRole.OWN: [each.episode.id for each in collected.policy_episodes],
        LessonRole.TRIED: tried,
    }
    who.learning_log.note_episodes(record.cycle, "", ((role, each) for role in roles for each in roles[role]))
    require_unerased(who.log, episodes)


def note_training(cycle: str, title: str, who: Collaborators, training_data: TrainingData) -> None:
    """Note what a candidate is about to be trained on. Raises LessonErased."""
    taught = [(LessonRole.DEMONSTRATION, each.episode_id) for each in training_data.demonstrations]
    taught += [(LessonRole.OWN, each.episode_id) for each in training_data.policy_episodes]
    who.learning_log.note_episodes(cycle, title, taught)
    require_unerased(who.log, [episode_id for _, episode_id in taught])


def note_weights(cycle: str, title: str, who: Collaborators, folder: Path) -> None:
    """Note what came of it."""
    who.learning_log.note_weights(cycle, title, weights_digest(folder))


def require_unerased(log: StepLog, episode_ids: Iterable[str]) -> None:
    """Raises LessonErased where one of these episodes is erased by now."""
    if erased := log.erased_among(episode_ids):
        names = ", ".join(sorted(erased)[:5])
        raise LessonErased(f"{len(erased)} of the episodes that the cycle has read were erased meanwhile ({names} ...)")
