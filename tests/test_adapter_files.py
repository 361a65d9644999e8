"""A sound adapter passes; each way in which a folder was ever seen to be broken is refused, with a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file as save_torch_file

from policies.adapters.base_network import BaseNetworkError, read_base_network
from policies.adapters.files import CONFIG_FILE, WEIGHTS_FILE, AdapterRefused, validate_adapter, weights_digest
from policies.adapters.probe import PROBE_FILE, read_probe, write_probe
from tests.scripted_engine import LIMITS
from tests.tiny_adapters import TinyNetwork

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyNetwork:
    return TinyNetwork(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tiny: TinyNetwork, tmp_path: Path) -> Path:
    return tiny.copy(1, tmp_path / "adapter")


def edit_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **settings}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def edit_probe(folder: Path, **settings: Any) -> None:
    probe = json.loads((folder / PROBE_FILE).read_text())
    (folder / PROBE_FILE).write_text(json.dumps({**probe, **settings}))


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def fill(tensors: dict[str, np.ndarray], name: str, value: float) -> None:
    tensors[name] = np.full_like(tensors[name], value)


def narrow(tensors: dict[str, np.ndarray]) -> None:
    name = f"{Q_PROJ}.lora_A.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][:, :-8])


def rename_module(tensors: dict[str, np.ndarray]) -> None:
    for side in "AB":
        tensors[f"base_model.model.model.layers.7.self_attn.q_proj.lora_{side}.weight"] = tensors.pop(
            f"{Q_PROJ}.lora_{side}.weight"
        )


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "folder is gone": (shutil.rmtree, "does not exist"),
    "folder is empty": (lambda f: [file.unlink() for file in f.iterdir()], f"has no {CONFIG_FILE}"),
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), f"has no {CONFIG_FILE}"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), f"has no {WEIGHTS_FILE}"),
    "no probe": (lambda f: (f / PROBE_FILE).unlink(), f"has no {PROBE_FILE}"),
    "config is no JSON": (lambda f: truncate(f / CONFIG_FILE, 50), f"{CONFIG_FILE} cannot be read"),
    "config is binary": (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe\x00"), f"{CONFIG_FILE} cannot be read"),
    "config is a list": (lambda f: (f / CONFIG_FILE).write_text("[]"), "not a JSON object"),
    "config is bottomless": (lambda f: (f / CONFIG_FILE).write_text("[" * 100_000), f"{CONFIG_FILE} cannot be read"),
    "probe is no JSON": (lambda f: truncate(f / PROBE_FILE, 50), f"{PROBE_FILE} cannot be read"),
    "probe is a list": (lambda f: (f / PROBE_FILE).write_text("[]"), f"{PROBE_FILE} cannot be read"),
    "probe without prompts": (lambda f: edit_probe(f, prompts=[]), "at least one prompt"),
    "probe forgives all": (lambda f: edit_probe(f, tolerance=50.0), "tolerance must lie in"),
    "probe outside the vocabulary": (
        lambda f: edit_probe(f, prompts=[{"prompt_token_ids": [10**6], "continuation": [[[1, -1.0, -2.0]]]}]),
        "outside the vocabulary",
    ),
    "probe too long": (
        lambda f: edit_probe(f, prompts=[{"prompt_token_ids": [1] * 1000, "continuation": [[[1, -1.0, -2.0]]]}]),
        "longer than the engine's",
    ),
    "weights cut in the header": (lambda f: truncate(f / WEIGHTS_FILE, 100), "damaged or cut short"),
    "weights cut in the values": (lambda f: truncate(f / WEIGHTS_FILE, -10), "damaged or cut short"),
    "weights are empty": (lambda f: truncate(f / WEIGHTS_FILE, 0), "damaged or cut short"),
    "weights hold no tensor": (lambda f: edit_tensors(f, dict.clear), "holds no tensor"),
    "weights full of NaN": (
        lambda f: edit_tensors(f, lambda t: fill(t, f"{Q_PROJ}.lora_A.weight", np.nan)),
        f"{Q_PROJ}.lora_A.weight has 128 values that are not finite",
    ),
    "one tensor infinite": (
        lambda f: edit_tensors(f, lambda t: fill(t, f"{Q_PROJ}.lora_B.weight", np.inf)),
        "not finite",
    ),
    "integers": (
        lambda f: edit_tensors(f, lambda t: t.update({k: v.astype(np.int8) for k, v in t.items()})),
        "stored as I8",
    ),
    "not a LoRA": (lambda f: edit_config(f, peft_type="IA3"), "only LORA is served"),
    "DoRA": (lambda f: edit_config(f, use_dora=True), "use_dora is set"),
    "trains biases": (lambda f: edit_config(f, bias="all"), "bias is 'all'"),
    "saves modules": (lambda f: edit_config(f, modules_to_save=["lm_head"]), "modules_to_save is set"),
    "ranks by module": (lambda f: edit_config(f, rank_pattern={"q_proj": 8}), "rank_pattern is set"),
    "rank too high": (lambda f: edit_config(f, r=64), "rank 64 is above the engine's limit of 16"),
    "rank not the tensors'": (lambda f: edit_config(f, r=8), "has shape (4, 48), but rank 8"),
    "rank zero": (lambda f: edit_config(f, r=0), "r must be a whole number"),
    "rank of words": (lambda f: edit_config(f, r="four"), "r must be a whole number"),
    "too narrow": (lambda f: edit_tensors(f, narrow), "has shape (4, 24)"),
    "unknown module": (
        lambda f: edit_tensors(f, rename_module),
        "has no linear module model.layers.7.self_attn.q_proj",
    ),
    "half a pair": (lambda f: edit_tensors(f, lambda t: t.pop(f"{Q_PROJ}.lora_B.weight")), "lacks its lora_B"),
    "a magnitude vector": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{Q_PROJ}.lora_magnitude_vector": np.ones(32, np.float32)})),
        "no part of a plain LoRA",
    ),
    "announces more than it holds": (
        lambda f: edit_config(f, target_modules=["q_proj", "v_proj", "down_proj", "o_proj"]),
        "no tensor for the target module 'o_proj'",
    ),
    "holds more than it announces": (lambda f: edit_config(f, target_modules=["q_proj", "v_proj"]), "is not among"),
    "targets by a pattern": (lambda f: edit_config(f, target_modules=".*_proj"), "must be a list of module names"),
    "another base": (lambda f: edit_probe(f, base_fingerprint="0" * 64), "trained on another base network"),
}


def test_a_sound_peft_folder_passes(tiny: TinyNetwork, folder: Path):
    files = validate_adapter(folder, LIMITS, tiny.network)
    assert files.rank == 4
    assert files.digest == weights_digest(folder)
    assert len(files.modules) == 2 * 3
    assert files.probe == read_probe(folder)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused_with_its_reason(name: str, tiny: TinyNetwork, folder: Path):
    break_it, reason = BROKEN[name]
    break_it(folder)
    with pytest.raises(AdapterRefused) as refusal:
        validate_adapter(folder, LIMITS, tiny.network)
    assert reason in str(refusal.value)


def test_no_cut_of_the_weights_file_passes(tiny: TinyNetwork, folder: Path):
    weights = (folder / WEIGHTS_FILE).read_bytes()
    for size in range(0, len(weights), 997):
        (folder / WEIGHTS_FILE).write_bytes(weights[:size])
        with pytest.raises(AdapterRefused):
            validate_adapter(folder, LIMITS, tiny.network)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_passes_and_one_bad_value_in_it_does_not(tiny: TinyNetwork, folder: Path, dtype: torch.dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in load_torch_file(folder / WEIGHTS_FILE).items()}
    save_torch_file(tensors, folder / WEIGHTS_FILE)
    validate_adapter(folder, LIMITS, tiny.network)
    for bad in (float("nan"), float("inf"), float("-inf")):
        tensors[f"{Q_PROJ}.lora_A.weight"][1, 2] = bad
        save_torch_file(tensors, folder / WEIGHTS_FILE)
        with pytest.raises(AdapterRefused, match="1 values that are not finite"):
            validate_adapter(folder, LIMITS, tiny.network)


def test_a_fresh_lora_whose_b_sides_are_zero_is_sound(tiny: TinyNetwork, folder: Path):
    edit_tensors(folder, lambda t: [fill(t, name, 0.0) for name in t if ".lora_B." in name])
    validate_adapter(folder, LIMITS, tiny.network)


def test_an_adapter_of_another_base_of_equal_sizes_is_refused(tiny: TinyNetwork, tmp_path: Path):
    other = TinyNetwork(tmp_path, seed=1)
    assert other.network.shapes == tiny.network.shapes
    with pytest.raises(AdapterRefused, match="another base network"):
        validate_adapter(other.adapter(1), LIMITS, tiny.network)


def test_a_base_that_is_saved_again_is_the_same_base(tiny: TinyNetwork, tmp_path: Path):
    again = shutil.copytree(tiny.model_folder, tmp_path / "again")
    config = json.loads((again / "config.json").read_text())
    (again / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9"}))
    assert read_base_network(again).fingerprint == tiny.network.fingerprint
    (again / "config.json").write_text(json.dumps({**config, "rope_theta": 17.0}))
    assert read_base_network(again).fingerprint != tiny.network.fingerprint


def test_a_base_folder_without_weights_is_an_error_that_says_so(tmp_path: Path):
    with pytest.raises(BaseNetworkError, match="no model"):
        read_base_network(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(BaseNetworkError, match="cannot be read"):
        read_base_network(tmp_path)


def test_a_probe_comes_back_as_it_was_written(tiny: TinyNetwork, tmp_path: Path):
    probe = replace(read_probe(tiny.adapter(1)), tolerance=0.07)
    write_probe(tmp_path, probe)
    assert read_probe(tmp_path) == probe
