"""python -m learner export: write logged episodes, with their rewards, in other people's formats.

Reads the state folder, whether a server runs on it or not. What is written can be imported again.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from learner.commands.server import ServerOptions, unknown_agent
from learner.terminal import plain
from runtime.store.episodes import Actor, Purpose

Rows = Iterable[dict[str, Any]]


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
    """The file to write, which is replaced once it is whole; for hf, a folder that is new or empty."""
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
    min_outcome: Annotated[float | None, Field(allow_inf_nan=False)] = None
    """Least outcome, the one that counts; an episode without any is left out."""


def run(options: ExportOptions) -> int:
    """Exit code 1 where there is nothing to read, the place cannot be written, or the format's package is missing."""
    # Imported late: the help needs none of it.
    from runtime.store.export import ExportFilter, export
    from runtime.store.learning_log import LearningReader
    from runtime.store.step_log import StepLog, StepLogError

    try:
        log = StepLog(options.state / "agent.db", read_only=True)
    except StepLogError as error:
        print(error, file=sys.stderr)
        return 1
    if problem := unknown_agent(log, options.agent):
        print(plain(problem), file=sys.stderr)
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
    write = {"hf": _write_sessions, "atif": _write_trajectories}.get(options.format, _write_lines)
    try:
        with _beside(options.out, is_folder=options.format == "hf") as place:
            num_written = write(place, rows)
    except ModuleNotFoundError as error:
        print(f"{error}: pip install 'stepagent[export]'", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise  # whoever reads along has had enough
    except (OSError, StepLogError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        print(plain(f"{options.out} was not written: {why}"), file=sys.stderr)
        return 1
    none = "" if num_written or options.format != "trl" else ": its rows are corrected steps, and there is none"
    told = plain(f"{options.out}: {num_written} written{none}")
    print(told, file=sys.stderr if _is_stream(options.out) else sys.stdout)
    return 0


@contextmanager
def _beside(out: Path, is_folder: bool) -> Iterator[Path]:
    """Where to write what is to stand at `out` whole, or not at all: it is moved there at the end. A pipe or a device
    is written as it is. Raises OSError."""
    if _is_stream(out):
        yield out
        return
    _require_place(out, is_folder)
    whole = out.resolve()  # of a link, what it names
    partial = whole.with_name(f".{whole.name}.partial")
    _remove(partial)  # of an export that was killed
    try:
        yield partial
        if whole.is_file():
            shutil.copymode(whole, partial)
        partial.replace(whole)
    finally:
        _remove(partial)


def _is_stream(out: Path) -> bool:
    return out.exists() and not out.is_file() and not out.is_dir()


def _require_place(out: Path, is_folder: bool) -> None:
    """Raises OSError in words. A session that has gone on has a new name: beside its old file it would be there
    twice."""
    if out.is_dir() and not is_folder:
        raise OSError("it is a folder, and this format is one file")
    if out.is_dir() and any(out.iterdir()):
        raise OSError("the folder is not empty, and what is in it would be taken for sessions of this export")
    if out.is_file() and is_folder:
        raise OSError("it is a file, and this format is a folder of files")
    if not out.resolve().parent.is_dir():
        raise OSError(f"there is no folder {out.parent}")


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)


def _write_lines(place: Path, rows: Rows) -> int:
    num_rows = 0
    with place.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            num_rows += 1
    return num_rows


def _write_trajectories(place: Path, rows: Rows) -> int:
    """Each as the format's own package reads it."""
    from atif import Trajectory  # pyright: ignore[reportMissingImports]

    def checked() -> Iterator[dict[str, Any]]:
        for row in rows:
            Trajectory.model_validate(row)
            yield row

    return _write_lines(place, checked())


def _write_sessions(folder: Path, rows: Rows) -> int:
    """One file for each session: that is what the viewer of traces takes."""
    folder.mkdir()
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
