"""Whatever clients rewrite of their conversations: no request is ever put on another conversation's step."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.client_traffic import REWRITES
from benchmarks.stitching import run
from policies.chat.chat_protocol import ChatProtocol

_ALWAYS_EXACT = ("plain", "spaced", "retried", "branched", "two_users", "sub_agents", "foreign", "judge")
"""What these clients send is word for word what was said: their steps stand on the very tokens of the step before."""

_ALWAYS_FOUND = (*_ALWAYS_EXACT, "as_text", "named")
"""The others may be missed where they say too little to be recognised by, such as "Thanks." and "Done.": that is no
error, but an episode of its own."""


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from(sorted(REWRITES)), min_size=1, max_size=6),
    seed=st.integers(0, 2**32),
    num=st.integers(4, 16),
)
def test_conversations_are_kept_apart(
    protocol: ChatProtocol, tmp_path_factory: pytest.TempPathFactory, kinds: list[str], seed: int, num: int
) -> None:
    traffic = asyncio.run(run(tmp_path_factory.mktemp("traffic"), protocol, num, kinds, seed))
    for tally in traffic.tallies.values():
        assert tally.counts["wrong"] == 0, tally.wrong


@pytest.mark.parametrize("kind", sorted(REWRITES))
def test_a_conversation_goes_on(protocol: ChatProtocol, tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    traffic = asyncio.run(run(tmp_path_factory.mktemp("traffic"), protocol, 8, [kind], seed=5))
    counts = traffic.tallies[kind].counts
    assert counts["wrong"] == 0
    assert counts["right"] > counts["missed"]
    if kind in _ALWAYS_FOUND:
        assert counts["missed"] == 0
    if kind in _ALWAYS_EXACT:
        assert counts["exact"] == counts["right"]
