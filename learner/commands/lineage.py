"""python -m learner lineage ADAPTER | EPISODE: what taught what, read from the state folder; no server is needed."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from pydantic_settings import CliPositionalArg

from learner.commands.server import ServerOptions, has_state
from runtime.store.lineage import Lineage, UnknownName


class LineageOptions(ServerOptions):
    """Show what an adapter was trained on, or what was made of an episode."""

    name: CliPositionalArg[str]
    """Of an adapter, an episode or a demonstration; also of one that was erased."""


def run(options: LineageOptions) -> int:
    """Prints JSON. Exit code 1 where nothing has this name."""
    if not has_state(options):
        return 1
    lineage = Lineage(options.state)
    for read in (lineage.of_adapter, lineage.of_episode):
        try:
            print(json.dumps(asdict(read(options.name)), indent=2))
            return 0
        except UnknownName:
            continue
    print(f"{options.state} knows no adapter and no episode {options.name!r}", file=sys.stderr)
    return 1
