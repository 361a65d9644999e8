"""The registry: versions for ever, states by the table, an acting pointer that can always go back."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.adapters.files import CONFIG_FILE, WEIGHTS_FILE, AdapterRefused, weights_digest
from policies.types import Adapter
from runtime.store.adapter_registry import TRANSITIONS, AdapterRegistry, AdapterState, RegistryError, UnknownAdapter
from tests.tiny_adapters import TinyNetwork

UP = (AdapterState.VALIDATED, AdapterState.LOADED, AdapterState.VERIFIED)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyNetwork:
    return TinyNetwork(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def registry(tmp_path: Path) -> AdapterRegistry:
    return AdapterRegistry(tmp_path / "agent.db")


def bring_up(registry: AdapterRegistry, path: Path) -> Adapter:
    adapter = registry.register(path)
    for state in UP:
        registry.record(adapter, state)
    return adapter


def test_versions_count_from_one_and_each_has_a_folder_of_its_own(
    tiny: TinyNetwork, registry: AdapterRegistry, tmp_path: Path
):
    first = registry.register(tiny.adapter(1), reason="cycle 1")
    second = registry.register(tiny.adapter(2), parent=first.name)
    assert (first.name, first.version, first.parent) == ("agent-v0001", 1, None)
    assert (second.name, second.version, second.parent) == ("agent-v0002", 2, "agent-v0001")
    assert second.path == tmp_path / "adapters" / "agent-v0002"
    assert second.digest == weights_digest(second.path) == weights_digest(tiny.adapter(2))
    assert second.rank == 4
    assert registry.adapters() == (first, second)
    assert registry.events(first.name)[0].reason == "cycle 1"


def test_what_the_maker_does_to_its_folder_afterwards_changes_nothing(
    tiny: TinyNetwork, registry: AdapterRegistry, tmp_path: Path
):
    adapter = registry.register(tiny.copy(1, tmp_path / "made"))
    shutil.rmtree(tmp_path / "made")
    assert weights_digest(adapter.path) == adapter.digest


def test_only_the_adapters_own_files_are_copied(tiny: TinyNetwork, registry: AdapterRegistry, tmp_path: Path):
    made = tiny.copy(1, tmp_path / "made")
    (made / "optimizer.pt").write_bytes(b"large")
    names = {file.name for file in registry.register(made).path.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "probe.json", "README.md"}


def test_registering_the_same_files_again_gives_the_same_adapter(tiny: TinyNetwork, registry: AdapterRegistry):
    assert registry.register(tiny.adapter(1)) == registry.register(tiny.adapter(1))
    assert len(registry.adapters()) == 1


def test_the_same_weights_under_another_config_are_another_adapter(
    tiny: TinyNetwork, registry: AdapterRegistry, tmp_path: Path
):
    made = tiny.copy(1, tmp_path / "made")
    config = json.loads((made / CONFIG_FILE).read_text())
    (made / CONFIG_FILE).write_text(json.dumps({**config, "lora_alpha": 99}))
    assert registry.register(tiny.adapter(1)) != registry.register(made)


def test_refused_files_get_a_new_judgement_under_a_new_version(tiny: TinyNetwork, registry: AdapterRegistry):
    first = registry.register(tiny.adapter(1))
    registry.record(first, AdapterState.REFUSED, "too bad")
    assert registry.register(tiny.adapter(1)).version == 2


@pytest.mark.parametrize("missing", [CONFIG_FILE, WEIGHTS_FILE, None])
def test_a_folder_without_identity_is_refused_and_leaves_no_trace(
    missing: str | None, tiny: TinyNetwork, registry: AdapterRegistry, tmp_path: Path
):
    made = tiny.copy(1, tmp_path / "made")
    (made / missing).unlink() if missing else shutil.rmtree(made)
    with pytest.raises(AdapterRefused):
        registry.register(made)
    assert registry.adapters() == ()
    assert list((tmp_path / "adapters").iterdir()) == []


def test_an_unknown_parent_or_name_is_an_error(tiny: TinyNetwork, registry: AdapterRegistry):
    with pytest.raises(UnknownAdapter):
        registry.register(tiny.adapter(1), parent="agent-v0009")
    for ask in (registry.adapter, registry.state, registry.events, registry.promote):
        with pytest.raises(UnknownAdapter):
            ask("agent-v0009")


def test_a_crash_in_the_middle_of_registering_is_forgotten(tiny: TinyNetwork, tmp_path: Path):
    AdapterRegistry(tmp_path / "agent.db").close()
    (tmp_path / "adapters" / ".incoming-1234").mkdir()
    shutil.copytree(tiny.adapter(2), tmp_path / "adapters" / "agent-v0001")  # moved in, but its row was not committed
    registry = AdapterRegistry(tmp_path / "agent.db")
    adapter = registry.register(tiny.adapter(1))
    assert adapter.version == 1
    assert weights_digest(adapter.path) == adapter.digest == weights_digest(tiny.adapter(1))
    assert [file.name for file in (tmp_path / "adapters").iterdir()] == ["agent-v0001"]


def test_at_first_the_base_network_acts_and_nothing_is_behind_it(registry: AdapterRegistry):
    assert registry.acting() is None
    assert registry.rollback_chain() == (None,)
    with pytest.raises(RegistryError, match="nothing to roll back to"):
        registry.rollback("why not")


def test_rolling_back_goes_down_the_line_and_never_to_and_fro(tiny: TinyNetwork, registry: AdapterRegistry):
    first, second = bring_up(registry, tiny.adapter(1)), bring_up(registry, tiny.adapter(2))
    registry.promote(first.name, "better")
    registry.promote(second.name, "better still")
    assert registry.rollback_chain() == (second, first, None)
    assert registry.state(first.name) is AdapterState.DRAINING
    assert registry.rollback("worse") == first
    assert registry.rollback_chain() == (first, None)
    assert registry.state(second.name) is AdapterState.DRAINING
    assert registry.rollback("worse too") is None
    assert registry.acting() is None
    registry.promote(second.name, "after all")
    assert registry.rollback_chain() == (second, None)


def test_all_of_it_is_there_after_opening_the_file_again(tiny: TinyNetwork, registry: AdapterRegistry, tmp_path: Path):
    adapter = bring_up(registry, tiny.adapter(1))
    registry.promote(adapter.name, "better")
    again = AdapterRegistry(tmp_path / "agent.db")
    assert again.acting() == adapter
    assert again.events(adapter.name) == registry.events(adapter.name)
    assert again.rollback_chain() == registry.rollback_chain()


def test_the_state_folder_may_be_moved(tiny: TinyNetwork, tmp_path: Path):
    registry = AdapterRegistry(tmp_path / "here" / "agent.db")
    registry.register(tiny.adapter(1))
    registry.close()
    (tmp_path / "here").rename(tmp_path / "there")
    moved = AdapterRegistry(tmp_path / "there" / "agent.db").adapter("agent-v0001")
    assert weights_digest(moved.path) == moved.digest


@pytest.mark.parametrize("table", ["adapters", "adapter_events", "acting"])
def test_rows_can_be_neither_edited_nor_deleted(table: str, tiny: TinyNetwork, registry: AdapterRegistry):
    registry.promote(bring_up(registry, tiny.adapter(1)).name)
    for sql in (f"UPDATE {table} SET created_at = 0", f"DELETE FROM {table}"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"), registry.db.atomic():
            registry.db.execute(sql)


def test_a_flip_that_fails_halfway_did_not_happen(tiny: TinyNetwork, registry: AdapterRegistry):
    first, second = bring_up(registry, tiny.adapter(1)), bring_up(registry, tiny.adapter(2))
    registry.promote(first.name)
    with registry.db.atomic():
        registry.db.execute(
            "CREATE TRIGGER fails BEFORE INSERT ON adapter_events WHEN NEW.state = 'acting' "
            "BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
        )
    with pytest.raises(sqlite3.IntegrityError):
        registry.promote(second.name)
    assert registry.acting() == first
    assert registry.state(first.name) is AdapterState.ACTING
    assert registry.state(second.name) is AdapterState.VERIFIED


def test_no_adapter_becomes_acting_beside_the_pointer(tiny: TinyNetwork, registry: AdapterRegistry):
    adapter = bring_up(registry, tiny.adapter(1))
    with pytest.raises(RegistryError, match="without being promoted"):
        registry.record(adapter, AdapterState.ACTING)


def test_refused_is_the_only_end_and_is_reached_from_every_state_before_acting():
    ends = {state for state, after in TRANSITIONS.items() if not after}
    assert ends == {AdapterState.REFUSED}
    before_acting = {*UP, AdapterState.REGISTERED, AdapterState.CANARY}
    assert all(AdapterState.REFUSED in TRANSITIONS[state] for state in before_acting)
    assert AdapterState.REFUSED not in TRANSITIONS[AdapterState.ACTING]


def test_every_way_to_acting_leads_over_verified():
    """Take VERIFIED out of the table: from REGISTERED and UNLOADED nothing acts any more."""
    for start in (AdapterState.REGISTERED, AdapterState.UNLOADED):
        reached, todo = {start}, deque([start])
        while todo:
            after = TRANSITIONS[todo.popleft()] - reached - {AdapterState.VERIFIED}
            reached |= after
            todo.extend(after)
        assert AdapterState.ACTING not in reached


@settings(deadline=None, max_examples=15)
@given(wanted=st.lists(st.sampled_from(AdapterState), max_size=20))
def test_only_the_tables_transitions_are_ever_recorded(
    tiny: TinyNetwork, tmp_path_factory: pytest.TempPathFactory, wanted: list[AdapterState]
):
    registry = AdapterRegistry(tmp_path_factory.mktemp("state") / "agent.db")
    adapter = registry.register(tiny.adapter(1))
    states = [AdapterState.REGISTERED]
    for state in wanted:
        if state in TRANSITIONS[states[-1]]:
            registry.promote(adapter.name) if state is AdapterState.ACTING else registry.record(adapter, state)
            states.append(state)
        else:
            with pytest.raises(RegistryError, match=f"cannot become {state}"):
                registry.record(adapter, state)
    assert [event.state for event in registry.events(adapter.name)] == states
    registry.close()
