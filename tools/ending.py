"""The end of a process that ran foreign code: a world or a tool may have left threads that nobody can end.

Python waits at its end for the threads of every pool, also for one that hangs. A server that had answered its last
request stayed until it was killed.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PATIENCE_S = 5.0
"""For threads to end by themselves once all work is done."""
CLEARING_S = 30.0
"""For what clears up then."""


@contextmanager
def ending_in_time() -> Iterator[None]:
    """When the block is left, the process ends with its exit code soon, whatever threads still run."""
    code = 1
    try:
        yield
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    finally:
        ending = _Ending(code)
        atexit.register(ending.begin)  # done first of all, once threads are no longer waited for
        threading.Thread(target=ending.hurry, name="ending", daemon=True).start()


class _Ending:
    """The end of the process: Python's own, or where a thread holds that up, ours."""

    def __init__(self, code: int) -> None:
        self._code = code
        self._clears_up = threading.Lock()
        """Held by whoever does: one of the two, once."""
        self._clearing = threading.Thread(target=atexit._run_exitfuncs, name="clearing up", daemon=True)

    def begin(self) -> None:
        """Python clears up by itself; where that is done already it waits here for the end."""
        if threading.current_thread() is not self._clearing:
            self._clears_up.acquire()

    def hurry(self) -> None:
        """After `PATIENCE_S` clear up in Python's place, and after `CLEARING_S` end, done or not."""
        time.sleep(PATIENCE_S)
        if self._clears_up.acquire(blocking=False):
            self._clearing.start()  # processes of worlds are ended, and their folders removed
            self._clearing.join(CLEARING_S)
        else:
            time.sleep(CLEARING_S)
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError, ValueError):  # whoever read it is gone
                stream.flush()
        os._exit(self._code)
