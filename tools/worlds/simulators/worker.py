"""The hosting process: python -m tools.worlds.simulators.worker MODULE:HOST

It reads requests from its standard input and answers on its standard output, one JSON line each. It holds a few live
episodes; a request names all calls of its episode, and the episode that has come furthest along them goes on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from typing import Any, TextIO

from tools.worlds.simulators.live import Host, Live

MAX_LIVE = 8
"""Episodes that are held at once."""
_PR_SET_PDEATHSIG = 1


class _LiveEpisodes:
    """The live episodes, the one used last at the end."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._held: list[tuple[str, list[Any], Live]] = []

    def at(self, settings: dict[str, Any], calls: list[Any]) -> Live:
        """An episode after these calls."""
        key = json.dumps(settings, sort_keys=True)
        fitting = [place for place, (k, made, _) in enumerate(self._held) if k == key and made == calls[: len(made)]]
        if fitting:
            _, made, live = self._held.pop(max(fitting, key=lambda place: len(self._held[place][1])))
        else:
            while len(self._held) >= MAX_LIVE:
                self._held.pop(0)[2].close()
            made, live = [], self._host.open(settings)
        try:
            for name, arguments in calls[len(made) :]:
                live.do(name, arguments)
        except BaseException:
            live.close()
            raise
        self._held.append((key, calls, live))
        return live


def _answer(episodes: _LiveEpisodes, request: dict[str, Any]) -> dict[str, Any]:
    try:
        live = episodes.at(request["settings"], request["calls"])
        return {"expert": live.expert()} if request["asks_expert"] else {"frame": asdict(live.frame)}
    except Exception as error:  # a package's own errors: the owner is told, and ends the episode
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _die_with_owner() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        raise SystemExit("the owner is gone")


def _private_output() -> TextIO:
    """The standard output for answers alone: what packages print goes elsewhere."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return output


def main(arguments: Sequence[str]) -> None:
    """Answer until the owner closes the input."""
    _die_with_owner()
    output = _private_output()
    module, _, name = arguments[0].partition(":")
    try:
        episodes = _LiveEpisodes(getattr(import_module(module), name)())
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}), file=output, flush=True)
        return
    print(json.dumps({}), file=output, flush=True)  # ready
    for line in sys.stdin:
        print(json.dumps(_answer(episodes, json.loads(line))), file=output, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
