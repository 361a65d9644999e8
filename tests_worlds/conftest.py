"""A cache folder of the tests' own: what a world makes on this machine is made anew."""

from __future__ import annotations

import atexit
import os
import tempfile

_folder = tempfile.TemporaryDirectory(prefix="stepagent-tests-worlds-")
atexit.register(_folder.cleanup)
os.environ["XDG_CACHE_HOME"] = _folder.name
