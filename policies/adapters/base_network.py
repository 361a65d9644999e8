"""What an adapter is held against: the base network's weight shapes and a fingerprint of its folder.

A network's name is no proof of sameness: two networks of equal sizes take each other's adapters without a word.
The fingerprint reads a sample of the weights, not all of them: it has to tell networks apart at every start within
a second, also a large one; it is not a checksum against damage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

SAMPLE_EVERY_BYTES = 1 << 20
SAMPLE_BYTES = 4096

VOLATILE_CONFIG_KEYS = {"transformers_version", "_name_or_path"}
"""Change when the same network is saved again, and say nothing about it."""


class BaseNetworkError(Exception):
    """A base network's folder cannot be read, and why."""


@dataclass(frozen=True, slots=True)
class BaseNetwork:
    """What is known of a base network without loading it."""

    fingerprint: str
    """SHA-256, in hex, of its configuration, its weights' names, types and shapes, and a sample of their bytes."""
    shapes: Mapping[str, tuple[int, ...]]
    """By the weight's name in the checkpoint: `model.layers.0.self_attn.q_proj.weight` -> (outputs, inputs)."""


MODEL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "model*.safetensors")
"""What is brought from the hub: no second copy of the weights in another format."""


def model_folder(model: str) -> Path:
    """The folder that a model is in: itself, or for a hub name the cache's, brought there from the hub if need be.

    Raises BaseNetworkError where it is neither a folder nor to be had.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(MODEL_FILES)))
    except (OSError, ValueError) as error:  # what the hub's library raises is one of both
        reason = str(error).partition("\n")[0]
        raise BaseNetworkError(f"{model} is no folder, and cannot be brought from the hub: {reason}") from error


def read_base_network(folder: Path) -> BaseNetwork:
    """Read a model folder's `config.json` and `model*.safetensors`. Raises BaseNetworkError where one is unreadable."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise BaseNetworkError(f"the base network's folder {folder} has no model*.safetensors file")
    try:
        headers = _read_headers(files)
        parts = [_canonical_config(folder), json.dumps(sorted(headers.items())).encode()]
        parts += [_sample(file) for file in files]
    except (OSError, ValueError, SafetensorError) as error:
        raise BaseNetworkError(f"the base network's folder {folder} cannot be read: {error}") from error
    return BaseNetwork(
        fingerprint=hashlib.sha256(b"\0".join(parts)).hexdigest(),
        shapes={name: shape for name, (_, shape) in headers.items()},
    )


def _read_headers(files: list[Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    headers = {}
    for file in files:
        with safe_open(file, framework="np") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a mapping)
                tensor = weights.get_slice(name)
                headers[name] = (tensor.get_dtype(), tuple(tensor.get_shape()))
    return headers


def _canonical_config(folder: Path) -> bytes:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return json.dumps({k: v for k, v in config.items() if k not in VOLATILE_CONFIG_KEYS}, sort_keys=True).encode()


def _sample(file: Path) -> bytes:
    """The digest of a few bytes out of every MiB of the file, counted from its end.

    From the end, because the header stands at the begin and holds remarks that say nothing about the weights.
    """
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for end in range(size, 0, -SAMPLE_EVERY_BYTES):
            stream.seek(max(0, end - SAMPLE_BYTES))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.digest()
