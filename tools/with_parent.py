"""python with_parent.py PID PROGRAM ARGUMENTS...: becomes the program, which then ends with the process PID.

Stands before the program of an MCP server: a well-kept one ends when its input does, but one that does not listen would
outlive a server that was killed. Linux alone can do this; elsewhere the program is started as it is.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before we asked to be told
            sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
