"""The model that everybody can have, fetched once, and servers of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def folder() -> Path:
    """In the user's cache: brought and converted where it is not there yet, which takes two minutes."""
    run = subprocess.run(
        [sys.executable, "-m", "policies.fetch", "smollm2-135m"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Path(run.stdout.splitlines()[-1])
