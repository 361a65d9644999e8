"""In which numbers the embedded engine computes, and that 16 bits still tell an adapter from another."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
import torch

import runtime.engines.embedded.precision as precision
from policies.adapters.files import AdapterRefused
from policies.adapters.probe import FULL_TOLERANCE, HALF_TOLERANCE, read_probe
from policies.novice.build import NOVICE_PATH
from policies.types import Adapter, SamplingParams
from runtime.adapters.verification import verify_adapter
from runtime.engines.embedded.engine import EmbeddedEngine
from runtime.engines.embedded.precision import choose_dtype
from tests.small_networks import complete, engine_on, prompt_of, rewrite
from tests.trained_adapters import trained_in_32_bits


def test_a_small_network_stays_exact_whatever_the_processor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "has_16_bits", lambda: True)
    monkeypatch.setattr(precision, "gain_of_16_bits", lambda sizes: 10.0)
    assert choose_dtype(NOVICE_PATH, "measured", "cpu") == torch.float32


@pytest.mark.parametrize(
    ("has_16_bits", "gain", "expected"),
    [(True, 3.0, torch.bfloat16), (True, 1.1, torch.float32), (False, 3.0, torch.float32)],
)
def test_16_bits_are_taken_where_they_were_seen_to_be_faster(
    monkeypatch: pytest.MonkeyPatch, has_16_bits: bool, gain: float, expected: torch.dtype
):
    monkeypatch.setattr(precision, "MIN_WEIGHTS", 1)
    monkeypatch.setattr(precision, "has_16_bits", lambda: has_16_bits)
    monkeypatch.setattr(precision, "gain_of_16_bits", lambda sizes: gain)
    assert choose_dtype(NOVICE_PATH, "measured", "cpu") == expected
    assert choose_dtype(NOVICE_PATH, "float32", "cpu") == torch.float32
    assert choose_dtype(NOVICE_PATH, "bfloat16", "cpu") == torch.bfloat16
    assert choose_dtype(NOVICE_PATH, "auto", "cuda") == "auto"


def test_the_gain_is_measured_on_what_takes_the_time(monkeypatch: pytest.MonkeyPatch):
    sizes = precision.Sizes.of(NOVICE_PATH)
    assert len(sizes.products) == 7
    assert 0.01 < precision.gain_of_16_bits(sizes) < 100
    seconds = {torch.float32: [4.0, 9.0], torch.bfloat16: [1.0, 1.0]}
    monkeypatch.setattr(precision, "seconds_of", lambda sizes, dtype: seconds[dtype])
    assert precision.gain_of_16_bits(sizes) == pytest.approx(6.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    path = trained_in_32_bits(tmp_path_factory.mktemp("trained"))
    return Adapter("agent-v0001", 1, path, 16, None, "")


@pytest.mark.parametrize(("numbers", "tolerance"), [("float32", FULL_TOLERANCE), ("bfloat16", HALF_TOLERANCE)])
async def test_what_was_trained_in_32_bits_is_verified_and_another_adapter_is_not(
    trained: Adapter, tmp_path: Path, numbers: precision.Precision, tolerance: float
):
    other = tmp_path / "other"
    shutil.copytree(trained.path, other)
    rewrite(other, lambda tensor: tensor * 0.5)
    engine = EmbeddedEngine(NOVICE_PATH, device="cpu", num_threads=1, precision=numbers)
    try:
        assert engine.limits.logprob_tolerance == tolerance
        await engine.load_adapter(trained)
        await verify_adapter(engine, trained, read_probe(trained.path))
        wrong = Adapter("agent-v0002", 2, other, 16, None, "")
        await engine.load_adapter(wrong)
        with pytest.raises(AdapterRefused, match="does not serve what was trained"):
            await verify_adapter(engine, wrong, read_probe(trained.path))
    finally:
        await engine.close()


async def test_in_16_bits_a_batch_that_shares_its_beginning_says_what_its_rows_say_alone():
    sampling = SamplingParams(max_tokens=1, temperature=0)
    prompts = [prompt_of(90) + prompt_of(5 + 7 * i, i) for i in range(5)]
    async with engine_on(NOVICE_PATH, precision="bfloat16", max_batch_size=1) as engine:
        alone = [await complete(engine, prompt, sampling) for prompt in prompts]
    async with engine_on(NOVICE_PATH, precision="bfloat16") as engine:
        together = await asyncio.gather(*(complete(engine, prompt, sampling) for prompt in prompts))
        assert engine.num_reused_tokens >= 4 * 90
    for (one,), (other,) in zip(alone, together, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=0.15)
