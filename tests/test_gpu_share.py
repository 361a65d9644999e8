"""Who takes which GPU, and how much of a shared one; on a machine without any, nothing is set."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.engines.gpu_share import (
    GIB,
    Gpu,
    fraction_of_user,
    num_gpus_of_engine,
    share_gpus,
    visible_gpus,
    weight_bytes_of,
)

BIG, SECOND = Gpu("0", 80 * GIB), Gpu("1", 80 * GIB)


def test_without_a_gpu_nothing_is_set() -> None:
    share = share_gpus([], 8 * GIB)
    assert (share.engine_fraction, dict(share.learner_environment), share.told) == (None, {}, "")


def test_on_one_gpu_the_memory_is_split_and_both_fit() -> None:
    share = share_gpus([BIG], 8 * GIB)
    assert share.engine_fraction == pytest.approx(1 - (10 + 8 + 2) / 80, abs=0.005)
    assert share.learner_environment == {"CUDA_VISIBLE_DEVICES": "0"}
    assert "0.75 of GPU 0 (60.0 of 80.0 GiB)" in share.told
    assert "gpu_memory_utilization" in share.told


@pytest.mark.parametrize("weights_gib", [0.01, 1, 3, 8, 16, 20, 30])
@pytest.mark.parametrize("total_gib", [8, 12, 24, 40, 80])
def test_the_split_is_never_more_than_there_is(weights_gib: float, total_gib: int) -> None:
    weights, total = int(weights_gib * GIB), total_gib * GIB
    share = share_gpus([Gpu("0", total)], weights)
    if share.engine_fraction is None:
        assert share.learner_environment == {"CUDA_VISIBLE_DEVICES": ""}, "the learner does not take what is not there"
        assert "does not fit" in share.told
    else:
        assert share.engine_fraction * total >= 1.25 * weights - 0.01 * total
        assert (1 - share.engine_fraction) * total >= 1.25 * weights
        assert share.engine_fraction <= 0.9


def test_with_two_gpus_the_learner_takes_the_second_whole() -> None:
    share = share_gpus([BIG, SECOND], 30 * GIB)
    assert share.engine_fraction is None
    assert share.learner_environment == {"CUDA_VISIBLE_DEVICES": "1"}
    assert share.told == "vLLM on GPU 0, the learner on GPU 1"


def test_an_engine_on_two_gpus_leaves_the_learner_the_third_or_a_part_of_the_second() -> None:
    third = Gpu("2", 80 * GIB)
    assert share_gpus([BIG, SECOND, third], GIB, num_for_engine=2).learner_environment["CUDA_VISIBLE_DEVICES"] == "2"
    shared = share_gpus([BIG, SECOND], GIB, num_for_engine=2)
    assert shared.learner_environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert shared.engine_fraction is not None


def test_what_the_user_gives_vllm_is_kept_and_the_learner_gets_the_rest() -> None:
    users = fraction_of_user({"gpu-memory-utilization": "0.5"})
    share = share_gpus([BIG], 60 * GIB, users_fraction=users)
    assert share.engine_fraction is None, "it is passed on as it was given"
    assert dict(share.learner_environment) == {"CUDA_VISIBLE_DEVICES": "0"}
    assert share.told == "vLLM takes 0.50 of GPU 0, as you set it, the learner the rest"
    assert fraction_of_user({}) is fraction_of_user({"gpu_memory_utilization": "half"}) is None


@pytest.mark.parametrize(
    ("engine_args", "number"),
    [
        ({}, 1),
        ({"tensor_parallel_size": 2}, 2),
        ({"tensor-parallel-size": "2", "data_parallel_size": 3}, 6),
        ({"tensor_parallel_size": "many"}, 1),
    ],
)
def test_the_engines_gpus_are_counted_from_its_arguments(engine_args: dict[str, object], number: int) -> None:
    assert num_gpus_of_engine(engine_args) == number


@pytest.fixture
def two_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvidia-smi that tells of two cards."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '0, GPU-aa, 81559'\necho '1, GPU-bb, 24564'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("two_cards")
def test_gpus_are_those_that_cuda_may_see_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible_gpus() == [Gpu("0", 81559 << 20), Gpu("1", 24564 << 20)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bb, 0")
    assert visible_gpus() == [Gpu("GPU-bb", 24564 << 20), Gpu("0", 81559 << 20)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_a_machine_without_a_driver_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []


def test_weights_are_counted_over_all_shards(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(b"1234")
    (tmp_path / "optimizer.bin").write_bytes(b"12345678")
    assert weight_bytes_of(tmp_path) == 8
