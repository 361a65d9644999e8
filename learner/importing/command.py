"""python -m learner import: read demonstration files, and send them to the server or show what they would teach."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import CliPositionalArg, NoDecode

from learner.commands.server import ServerOptions, ask
from learner.importing.coverage import Coverage
from learner.importing.demonstrations import ImportedDemonstration, read_demonstrations
from learner.importing.json_lines import Refusal
from learner.terminal import plain
from policies.command_line import split_commas

if TYPE_CHECKING:
    from learner.client import Endpoint

BATCH = 64
"""Demonstrations of one import request."""


class ImportOptions(ServerOptions):
    """Import demonstration files into a server, or show what each record would teach."""

    files: CliPositionalArg[list[Path]]
    """Demonstration files: JSONL, JSON, or session files."""
    dry_run: bool = False
    """Send nothing, need no server; show what each record would teach."""
    as_json: bool = Field(False, validation_alias="json")
    """With --dry-run: one JSON object a record."""
    ignore: Annotated[list[str], NoDecode] = Field(default_factory=list)
    """Keys of the records that are harmless. Repeat or separate by commas."""

    @field_validator("ignore", mode="before")
    @classmethod
    def _split_commas(cls, given: object) -> list[str]:
        return split_commas(given)


def run(options: ImportOptions) -> int:
    """Exit code 1 where anything was refused, 2 for options that make no sense."""
    if options.dry_run:
        return _show(options)
    if options.as_json:
        print("--json goes with --dry-run: the server answers for whole batches", file=sys.stderr)
        return 2
    num_refused = ask(options, lambda server: _import(options, server))
    if num_refused is not None and (outlook := _outlook(options.state, options.agent)):
        print(outlook)
    return 0 if num_refused == 0 else 1


def _outlook(state: Path, agent: str) -> str | None:
    """What an agent's demonstrations in a state folder can show, where no world's tasks judge, and whether they
    contradict each other; None for no such folder."""
    import asyncio

    from learner.data.collect import dealt_demonstrations
    from learner.data.doubts import doubts_of
    from learner.data.experts import Corrections
    from learner.evaluation.outlook import Demonstrated, import_outlook
    from learner.options import CollectionOptions
    from runtime.store.step_log import StepLog, StepLogError

    try:
        log = StepLog(state / "agent.db", read_only=True)
    except StepLogError:  # the server runs elsewhere, or keeps its state elsewhere
        return None
    collection = CollectionOptions()
    dealt = dealt_demonstrations(log, collection, agent)
    held_out, others = (Demonstrated.of(side, dealt.task_of) for side in (dealt.held_out, dealt.demonstrations))
    outlook = import_outlook(held_out, others, collection.held_out_share)
    doubts = asyncio.run(doubts_of([*dealt.demonstrations, *dealt.held_out], [Corrections(log)], None))
    told = f"{state}: where no world's tasks judge, {outlook.sentence}"
    if doubts:
        whose = f" --agent {agent}" if agent else ""
        told += f"\n{len(doubts)} of the steps are contradicted: python -m learner doubts --state {state}{whose}"
    return told


# ------------------------------------------------------------------------------------------------- dry run


def _show(options: ImportOptions) -> int:
    """What each record would teach. Not checked here: what takes the server's model (its context, its own marks)."""
    coverage = Coverage()
    seen: set[str] = set()
    for path in options.files:
        for read in read_demonstrations(path, options.ignore):
            status = _status(read, seen)
            if isinstance(read, Refusal):
                coverage.refuse(read.reason)
            elif status == "known":
                coverage.know()
            else:
                coverage.add(read)
            print(_as_json(path, read, status) if options.as_json else _as_text(path, read, status))
    if not options.as_json:
        print("", *map(plain, coverage.table().split("\n")), sep="\n")
    return 1 if coverage.statuses["refused"] else 0


def _status(read: ImportedDemonstration | Refusal, seen: set[str]) -> str:
    """`known` is what stood in these files before: whether the server knows it, only the server can tell."""
    if isinstance(read, Refusal):
        return "refused"
    if read.digest in seen:
        return "known"
    seen.add(read.digest)
    return "imported"


def _as_json(path: Path, read: ImportedDemonstration | Refusal, status: str) -> str:
    shown: dict[str, Any] = {"file": str(path), "line": _line(read), "status": status}
    if isinstance(read, Refusal):
        shown |= {"reason": read.reason, "messages": [], "tools": [], "learned": []}
    else:
        shown |= {"reason": None, "messages": read.messages, "tools": read.tools, "learned": read.learn_from}
    return json.dumps(shown, ensure_ascii=False)


def _as_text(path: Path, read: ImportedDemonstration | Refusal, status: str) -> str:
    title = f"{path}{f' line {_line(read)}' if _line(read) else ''}: {status}"
    if isinstance(read, Refusal):
        return plain(f"{title}: {read.reason}")
    tools = ", ".join(tool["function"]["name"] for tool in read.tools)
    lines = [f"{title}, {read.provenance.format.value}" + (f"; tools: {tools}" if tools else "")]
    for index, message in enumerate(read.messages):
        mark = "learned" if index in read.learn_from else ""
        lines.append(f"  {mark:<8}{message['role']:<10}{_said(message)}")
    return "\n".join(map(plain, lines))


def _said(message: dict[str, Any], most: int = 90) -> str:
    thought = f"(thinks: {message['reasoning_content']}) " if "reasoning_content" in message else ""
    calls = [f"{c['function']['name']}({c['function']['arguments']})" for c in message.get("tool_calls", ())]
    text = " ".join(f"{thought}{message['content']} {' '.join(calls)}".split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _line(read: ImportedDemonstration | Refusal) -> int:
    return read.line if isinstance(read, Refusal) else read.provenance.line


# ------------------------------------------------------------------------------------------------- sending


async def _import(options: ImportOptions, endpoint: Endpoint) -> int:
    """Send what can be read, in batches, and say by its line what cannot; returns how many were refused."""
    from tqdm import tqdm

    num_refused = 0
    for path in options.files:
        sums: Counter[str] = Counter()
        batch: list[ImportedDemonstration] = []
        for read in tqdm(read_demonstrations(path, options.ignore), desc=str(path), unit=" records"):
            if isinstance(read, ImportedDemonstration):
                batch.append(read)
                sums["without tools"] += read.calls_without_tools
            else:
                _refused(path, read.line, read.reason, sums)
            if len(batch) == BATCH:
                await _send(path, batch, endpoint, sums)
                batch = []
        await _send(path, batch, endpoint, sums)
        print(f"{path}: {sums['imported']} imported, {sums['known']} known already, {sums['refused']} refused")
        if sums["without tools"]:
            print(f"{path}: {_without_tools(sums['without tools'])}")
        num_refused += sums["refused"]
    return num_refused


def _without_tools(number: int) -> str:
    return (
        f"{number} call tools and do not say which were on offer. Where the agent's own tools are those, they are "
        "learned with them, as they are served; else without any in the prompt: if your requests bring `tools`, put "
        "the same `tools` into the records"
    )


async def _send(path: Path, batch: Sequence[ImportedDemonstration], endpoint: Endpoint, sums: Counter[str]) -> None:
    """Send a batch, in halves where the server finds it too large."""
    from openai import APIStatusError

    if not batch:
        return
    try:
        answer = await endpoint.demonstrate([demonstration.to_wire() for demonstration in batch])
    except APIStatusError as error:
        if error.status_code != 413:
            raise
        if len(batch) == 1:
            return _refused(path, batch[0].provenance.line, "it is too large for the server", sums)
        await _send(path, batch[: len(batch) // 2], endpoint, sums)
        return await _send(path, batch[len(batch) // 2 :], endpoint, sums)
    sums.update(imported=answer["imported"], known=answer["already_known"])
    for refusal in answer["refused"]:
        _refused(path, batch[refusal["index"]].provenance.line, refusal["reason"], sums)


def _refused(path: Path, line: int, reason: str, sums: Counter[str]) -> None:
    from tqdm import tqdm

    tqdm.write(plain(f"{path}{f' line {line}' if line else ''}: {reason}"))  # line 0: the file as a whole
    sums["refused"] += 1
