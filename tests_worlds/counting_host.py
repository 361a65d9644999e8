"""A simulator that counts, and that hangs, dies, raises or talks too much when it is told to: for the pool's tests."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from tools.worlds.simulators.live import Frame, RawCall, Settings


class Counter:
    def __init__(self, settings: Settings) -> None:
        self.number = int(settings["from"])
        self.frame = Frame(f"{self.number} in {os.getpid()}" if settings.get("says_process") else str(self.number))

    def do(self, name: str, arguments: Mapping[str, Any]) -> None:
        if name == "hang":
            time.sleep(1000)
        if name == "die":
            os._exit(3)
        if name == "raise":
            raise LookupError("lost count")
        if name == "where":
            self.frame = Frame(os.getcwd())
            return
        if name == "have_child":
            child = subprocess.Popen(["sleep", "1000"])
            self.frame = Frame(str(child.pid))
            return
        self.number += int(arguments["by"])
        print("a package that prints")
        text = "x" * self.number if name == "talk" else str(self.number)
        self.frame = Frame(text, self.number >= 10**7, 0.0, str(self.number))

    def expert(self) -> RawCall | None:
        return ("add", {"by": 1})

    def close(self) -> None:
        pass


class CountingHost:
    def open(self, settings: Settings) -> Counter:
        if settings.get("fails"):
            raise LookupError("nothing to open")
        return Counter(settings)
