"""A cache folder of the tests' own: what a world makes on this machine is made anew."""

from __future__ import annotations

import os
import tempfile

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="stepagent-tests-worlds-")
