"""The end of a process that ran foreign code: a world or a tool may have left threads that nobody can end.

Python waits at its end for the threads of every pool, also for one that hangs. A server that had answered its last
request stayed until it was killed.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PATIENCE_S = 5.0
"""For threads to end by themselves once all work is done."""


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
        is_past_threads = threading.Event()
        atexit.register(is_past_threads.set)  # the first thing that is done once threads are no longer waited for
        threading.Thread(target=_end, args=(code, is_past_threads), name="ending", daemon=True).start()


def _end(code: int, is_past_threads: threading.Event) -> None:
    if is_past_threads.wait(PATIENCE_S):
        return
    atexit._run_exitfuncs()  # processes of worlds are ended, and their folders removed
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):  # whoever read it is gone
            stream.flush()
    os._exit(code)
