"""A bounded number of hosting processes, shared by all episodes of a world.

An episode belongs to no process: it is its task's settings and the calls made so far, and whichever process holds that
state goes on with it. So nothing has to be closed, a process that died is replaced and the calls are made again, and
what was observed once is remembered: opening an episode again costs no simulation.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from tools.worlds.simulators.live import Frame, RawCall, Settings
from tools.worlds.world import WorldFailed

MAX_REMEMBERED_CHARS = 64_000_000
"""Of observations, over all episodes of a pool."""
RETRY_AFTER_S = 300.0
"""That a time-out or a death is remembered: the machine may only have been busy, and the same way is tried anew."""
START_TIMEOUT_S = 120.0
"""For a process to import its package and to start its JVM or browser."""
_ROOT = Path(__file__).parents[3]
# A process that is to die with its owner dies with the *thread* that started it. This thread lives as long as we do.
_starter = ThreadPoolExecutor(1, "simulator-starter")


class SimulatorFailed(WorldFailed):
    """A simulator raised, hung or could not be started."""


class _Passing(SimulatorFailed):
    """It may work another time: a time-out, or a process that ended."""


class _Gone(Exception):
    """The process has ended."""


class SimulatorPool:
    """The processes of one world, started as they are needed."""

    def __init__(
        self, host: str, num_processes: int = 2, timeout_s: float = 30.0, environment: Mapping[str, str] | None = None
    ) -> None:
        """`host` is module:Class. A process that has not answered in `timeout_s` is killed."""
        self._processes = [_Process(host, timeout_s, environment or {}) for _ in range(num_processes)]
        self._seen = _Seen()
        atexit.register(self.close)

    def frame(self, settings: Settings, calls: Sequence[RawCall]) -> Frame:
        """What is there after these calls. A simulator that fails on the last of them ends the episode with a reason.

        Raises SimulatorFailed where the task cannot be opened at all.
        """
        key = _key(settings, calls)
        frame = self._seen.get(key)
        if frame is None:
            try:
                frame = Frame(**self._ask(settings, calls, asks_expert=False)["frame"])
            except SimulatorFailed as error:
                if not calls:
                    raise
                text = f"Error: the world has failed ({error}). The episode is over."
                frame = Frame(text, is_done=True, failure=str(error))
                self._seen.put(key, frame, RETRY_AFTER_S if isinstance(error, _Passing) else None)
            else:
                self._seen.put(key, frame)
        return frame

    def expert(self, settings: Settings, calls: Sequence[RawCall]) -> RawCall | None:
        """The expert's next call; None where it does not know, and where the simulator fails."""
        try:
            answer = self._ask(settings, calls, asks_expert=True)["expert"]
        except SimulatorFailed:
            return None
        return None if answer is None else (answer[0], answer[1])

    def close(self) -> None:
        """End all processes; the next request starts them again."""
        for process in self._processes:
            with process.lock:
                process.kill()

    def forget(self) -> None:
        """Remember nothing that was observed: all of it is simulated again."""
        self._seen = _Seen()

    @property
    def process_ids(self) -> list[int]:
        """Of the processes that run."""
        return [process.id for process in self._processes if process.id]

    def _ask(self, settings: Settings, calls: Sequence[RawCall], asks_expert: bool) -> dict[str, Any]:
        # By task, so that a process that holds an episode's state is found again without asking around.
        place = zlib.crc32(json.dumps(settings, sort_keys=True).encode()) % len(self._processes)
        process = self._processes[place]
        request = {"settings": settings, "calls": calls, "asks_expert": asks_expert}
        with process.lock:
            try:
                answer = process.ask(request)
            except _Gone:  # it may have been killed from outside while it waited; the calls are made again
                try:
                    answer = process.ask(request)
                except _Gone as error:
                    raise _Passing(f"its process ended: {error}") from error
        if "error" in answer:
            raise SimulatorFailed(answer["error"])
        return answer


class _Process:
    """One hosting process; whoever talks to it holds its lock."""

    def __init__(self, host: str, timeout_s: float, environment: Mapping[str, str]) -> None:
        self.lock = threading.Lock()
        self._host, self._timeout_s, self._environment = host, timeout_s, environment
        self._popen: subprocess.Popen[bytes] | None = None
        self._folder = ""

    @property
    def id(self) -> int | None:
        return self._popen.pid if self._popen and self._popen.poll() is None else None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises SimulatorFailed for a time-out, _Gone where it has ended."""
        try:
            if self._popen is None:
                ready = self._read_line(_starter.submit(self._start).result(), START_TIMEOUT_S)
                if "error" in ready:
                    self.kill()
                    return ready
            popen = self._popen
            assert popen is not None
            assert popen.stdin is not None
            popen.stdin.write(json.dumps(request).encode() + b"\n")
            popen.stdin.flush()
            return self._read_line(popen, self._timeout_s)
        except TimeoutError as error:
            self.kill()
            raise _Passing(str(error)) from None
        except (OSError, _Gone) as error:
            raise _Gone(f"exit code {self.kill()}") from error

    def _start(self) -> subprocess.Popen[bytes]:
        self._folder = tempfile.mkdtemp(prefix="stepagent-world-")
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "tools.worlds.simulators.worker", self._host],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder,  # what a package writes beside itself goes with the process
            env={**os.environ, "TMPDIR": self._folder, "PYTHONPATH": _search_path(), **self._environment},
            start_new_session=True,  # so that its own children can be killed with it
        )
        return self._popen

    def _read_line(self, popen: subprocess.Popen[bytes], timeout_s: float) -> dict[str, Any]:
        assert popen.stdout is not None
        deadline = time.monotonic() + timeout_s
        line = bytearray()
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([popen.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise TimeoutError(f"it did not answer within {timeout_s:g} seconds")
            part = os.read(popen.stdout.fileno(), 1 << 16)
            if not part:
                raise _Gone
            line += part
        return json.loads(line)

    def kill(self) -> int | None:
        """End the process and its children; its exit code, where it has ended by itself."""
        popen, self._popen = self._popen, None
        if popen is None:
            return None
        code = None
        with suppress(subprocess.TimeoutExpired):  # one that has closed its output is about to end
            code = popen.wait(1.0) if _is_at_end(popen) else popen.poll()
        with suppress(ProcessLookupError):
            os.killpg(popen.pid, signal.SIGKILL)
        popen.wait()
        for pipe in (popen.stdin, popen.stdout):
            with suppress(OSError):  # what was still to be written has no reader
                if pipe is not None:
                    pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        return code


def _search_path() -> str:
    """For a process to find this project's modules wherever it runs."""
    return os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))


def _is_at_end(popen: subprocess.Popen[bytes]) -> bool:
    assert popen.stdout is not None
    readable, _, _ = select.select([popen.stdout], [], [], 0.0)
    return bool(readable) and not os.read(popen.stdout.fileno(), 1)


def _key(settings: Settings, calls: Sequence[RawCall]) -> tuple[str, ...]:
    return (
        json.dumps(settings, sort_keys=True),
        *(f"{name} {json.dumps(arguments, sort_keys=True)}" for name, arguments in calls),
    )


class _Seen:
    """Frames by what led to them; the ones used longest ago are forgotten first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._frames: OrderedDict[tuple[str, ...], Frame] = OrderedDict()
        self._num_chars = 0
        self._ends: dict[tuple[str, ...], float] = {}
        """When those are forgotten that are not kept (time.monotonic)."""

    def get(self, key: tuple[str, ...]) -> Frame | None:
        with self._lock:
            if time.monotonic() > self._ends.get(key, float("inf")):
                self._forget(key)
            if key in self._frames:
                self._frames.move_to_end(key)
            return self._frames.get(key)

    def put(self, key: tuple[str, ...], frame: Frame, seconds: float | None = None) -> None:
        """Remember a frame; for so many seconds, or as long as there is room."""
        with self._lock:
            if key in self._frames:
                self._forget(key)
            self._num_chars += _size(key, frame)
            self._frames[key] = frame
            if seconds is not None:
                self._ends[key] = time.monotonic() + seconds
            while self._num_chars > MAX_REMEMBERED_CHARS and len(self._frames) > 1:
                self._forget(next(iter(self._frames)))

    def _forget(self, key: tuple[str, ...]) -> None:
        self._num_chars -= _size(key, self._frames.pop(key))
        self._ends.pop(key, None)


def _size(key: tuple[str, ...], frame: Frame) -> int:
    return sum(map(len, key)) + len(frame.observation) + 500
