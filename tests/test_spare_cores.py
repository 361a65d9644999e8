"""The learner takes the cores that others leave, and gives them back at its next look."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from learner.training.spare_cores import SpareCores


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_as_many_threads_as_cores_that_others_leave() -> None:
    now = [10.0, 100.0, 5.0]
    cores = SpareCores(4, (10.0, 100.0, 5.0), lambda: (now[0], now[1], now[2]))
    for others, threads in ((0.0, 4), (0.25, 4), (1.0, 3), (2.9, 1), (4.0, 1), (0.0, 4)):
        now = [now[0] + 10, now[1] + 10 * (others + 1.5), now[2] + 10 * 1.5]  # ours are not held against us
        cores.take()
        assert torch.get_num_threads() == threads, others


def test_a_look_that_is_too_short_changes_nothing() -> None:
    torch.set_num_threads(1)
    cores = SpareCores(2, (10.0, 100.0, 5.0), lambda: (10.5, 100.0, 5.0))
    cores.take()
    assert torch.get_num_threads() == 1


def test_this_machine_is_looked_at() -> None:
    cores = SpareCores.of_this_machine()
    if cores is not None:
        clock, everybody, own = cores.look()
        assert clock > 0
        assert everybody > own > 0
