"""python -m learner export: write logged episodes, with their rewards, in other people's formats.

Reads the state folder, whether a server runs on it or not. What is written can be imported again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from learner.commands.server import ServerOptions
from runtime.store.episodes import Actor, Purpose


def _moment(given: object) -> object:
    """Unix seconds of a date or a time; without a zone it is UTC."""
    if not isinstance(given, str):
        return given
    try:
        moment = datetime.fromisoformat(given)
    except ValueError as error:
        raise ValueError(f"{given!r} is no date: write 2026-11-26, or 2026-11-26T12:00+01:00") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


class ExportOptions(ServerOptions):
    """Write logged episodes, with their rewards, in other people's formats. What is written can be imported again."""

    format: Literal["atif", "openai", "trl", "hf"]
    """hf: session traces, one file each in a folder."""
    out: Path
    """The file to write; for hf, the folder."""
    purpose: Purpose | None = None
    """Why the episodes were run."""
    actor: Actor | None = None
    """expert: demonstrations."""
    adapter: str | None = None
    """The adapter, or the expert, that acted."""
    task_prefix: str | None = None
    """Of the world's tasks: order_desk/train."""
    since: Annotated[float | None, BeforeValidator(_moment)] = None
    """Episodes that began then or later: 2026-11-26, or with a time."""
    min_outcome: float | None = None
    """The newest outcome; without one an episode is left out."""


def run(options: ExportOptions) -> int:
    """Exit code 1 where there is nothing to read, or the format's package is missing."""
    # Imported late: the help needs none of it.
    from runtime.store.export import ExportFilter, export
    from runtime.store.learning_log import LearningReader
    from runtime.store.step_log import StepLog, StepLogError

    try:
        log = StepLog(options.state / "agent.db", read_only=True)
    except StepLogError as error:
        print(error, file=sys.stderr)
        return 1
    wanted = ExportFilter(
        purpose=options.purpose,
        actor=options.actor,
        adapter=options.adapter,
        task_prefix=options.task_prefix,
        since=options.since,
        min_outcome=options.min_outcome,
        agent=options.agent or None,
    )
    rows = export(log, LearningReader(options.state), wanted, options.format)
    try:
        num_written = _write_sessions(options.out, rows) if options.format == "hf" else _write(options, rows)
    except ModuleNotFoundError as error:
        print(f"{error}: pip install 'stepagent[export]'", file=sys.stderr)
        return 1
    print(f"{options.out}: {num_written} written")
    return 0


def _write(options: ExportOptions, rows: Iterable[dict[str, Any]]) -> int:
    if options.format == "atif":
        rows = _checked(rows)
    num_rows = 0
    with options.out.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            num_rows += 1
    return num_rows


def _checked(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each trajectory as the format's own package reads it."""
    from atif import Trajectory  # pyright: ignore[reportMissingImports]

    for row in rows:
        Trajectory.model_validate(row)
        yield row


def _write_sessions(folder: Path, rows: Iterable[dict[str, Any]]) -> int:
    """One file for each session: that is what the viewer of traces takes."""
    folder.mkdir(parents=True, exist_ok=True)
    num_sessions, file = 0, None
    try:
        for row in rows:
            if row["type"] == "session":
                if file is not None:
                    file.close()
                file = (folder / f"{row['id']}.jsonl").open("w", encoding="utf-8")
                num_sessions += 1
            if file is not None:
                file.write(json.dumps(row) + "\n")
    finally:
        if file is not None:
            file.close()
    return num_sessions
