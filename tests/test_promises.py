"""The promises of the house. Breaking one is a decision, not a fix."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2ForCausalLM

from learner.options import TrainingOptions
from learner.packing.scoring import PackedBatch, SequenceLogprobs, score
from policies.adapters.base_network import read_base_network
from policies.adapters.probe import write_probe
from policies.chat.chat_protocol import ChatProtocol
from runtime.engines.embedded.engine import EmbeddedEngine
from runtime.store.episodes import Actor
from runtime.store.learning_log import CycleStage
from tests.cycles import QUICK, WORLD, run
from tests.demonstrations import expert_demonstration
from tests.demonstrations import post as demonstrate
from tests.serving import NOVICE_FOLDER, Served, parts_of, served, wait_until
from tests.tiny_adapters import randomise_lora, true_probe

QUESTION = {"role": "user", "content": "Order 1000 has come in. Please see to it."}


def ask(server: Served, **options: object) -> object:
    body = {"model": "novice", "messages": [QUESTION], "temperature": 0, **options}
    return server.client().chat.completions.with_raw_response.create(**body)  # type: ignore[call-overload]


# ------------------------------------------------------------------------------------- a server with adapters


@pytest.fixture(scope="module")
def adapter_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two real PEFT adapters of the novice, as a trainer would leave them."""
    fingerprint = read_base_network(NOVICE_FOLDER).fingerprint
    folders = tuple(tmp_path_factory.mktemp("adapter") for _ in range(2))
    for seed, folder in enumerate(folders):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        peft_model = get_peft_model(Qwen2ForCausalLM.from_pretrained(NOVICE_FOLDER), config)
        randomise_lora(peft_model, seed)
        peft_model.save_pretrained(str(folder))
        write_probe(folder, true_probe(peft_model, fingerprint))
    return folders


@pytest.fixture
def server(protocol: ChatProtocol, tmp_path: Path) -> Iterator[Served]:
    """The novice on an engine of its own, into which adapters can be loaded."""
    engine = EmbeddedEngine(NOVICE_FOLDER, tokenizer=protocol.tokenizer, device="cpu", num_threads=1)
    with served(parts_of(engine, protocol, tmp_path / "state")) as running:
        yield running
    asyncio.run(engine.close())


def post(server: Served, path: str, /, **body: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/adapters{path}", json=body, timeout=60)


def promoted(server: Served, folder: Path) -> str:
    """The name of an adapter that acts from now on."""
    name = post(server, "", path=str(folder)).raise_for_status().json()["name"]
    post(server, f"/{name}/promote").raise_for_status()
    return name


def adapter_of_next_step(server: Served, episode_id: str) -> str:
    """Which adapter answers, in an episode that goes on with every question."""
    spoken = [step.new_messages for step in server.parts.log.steps(episode_id)]
    question = {"role": "user", "content": f"Question {len(spoken)}"}
    options = {"messages": [question], "metadata": {"episode_id": episode_id}, "tools": [], "max_tokens": 4}
    return ask(server, **options).headers["x-adapter"]  # type: ignore[attr-defined]


def test_1_an_episode_uses_one_adapter_from_first_to_last_step(
    server: Served, adapter_folders: tuple[Path, Path]
) -> None:
    assert adapter_of_next_step(server, "early") == "base"
    first = promoted(server, adapter_folders[0])
    assert adapter_of_next_step(server, "middle") == first
    second = promoted(server, adapter_folders[1])
    assert adapter_of_next_step(server, "late") == second
    for episode_id, name in (("early", "base"), ("middle", first), ("late", second)):
        assert adapter_of_next_step(server, episode_id) == name
        assert {step.adapter for step in server.parts.log.steps(episode_id)} == {name}


def test_4_a_refused_candidate_never_acts(server: Served, adapter_folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Its weights are sound, but they are not those whose probe lies beside them."""
    lying = tmp_path / "lying"
    shutil.copytree(adapter_folders[0], lying)
    shutil.copy(adapter_folders[1] / "probe.json", lying / "probe.json")
    refusal = post(server, "", path=str(lying))
    assert refusal.status_code == 409, refusal.text
    (record,) = httpx.get(f"{server.url}/v1/adapters").json()["data"]
    assert post(server, f"/{record['name']}/promote").status_code == 409
    assert server.parts.registry.acting() is None
    assert server.parts.engine.loaded_adapters() == ()
    assert adapter_of_next_step(server, "after") == "base"


def test_5_rollback_needs_no_learner_and_goes_back_step_by_step(
    server: Served, adapter_folders: tuple[Path, Path]
) -> None:
    first = promoted(server, adapter_folders[0])
    promoted(server, adapter_folders[1])
    for name in (first, "base"):
        assert post(server, "/rollback", reason="as before").json() == {"acting": name}
        assert adapter_of_next_step(server, f"after-{name}") == name


def test_9_what_is_served_under_an_adapters_name_is_that_adapter(
    server: Served, adapter_folders: tuple[Path, Path], protocol: ChatProtocol
) -> None:
    name = promoted(server, adapter_folders[0])
    promoted(server, adapter_folders[1])
    for model in (name, "base"):  # pinned, while another one acts
        step_id = ask(server, model=model, tools=[], max_tokens=12).headers["x-step-id"]  # type: ignore[attr-defined]
        step = server.parts.log.step(step_id)
        assert step is not None
        assert step.behavior_logprobs is not None
        assert step.adapter == model
        network = Qwen2ForCausalLM.from_pretrained(NOVICE_FOLDER)
        by_itself = network if model == "base" else PeftModel.from_pretrained(network, str(adapter_folders[0]))
        expected = logprobs_of(by_itself, step.prompt_token_ids, step.completion_token_ids)
        assert step.behavior_logprobs == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def logprobs_of(network: torch.nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> list[float]:
    """Of a completion's tokens, in one plain forward pass."""
    logits = network.eval()(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return [logprobs[place, token_id].item() for place, token_id in enumerate(completion)]


# ------------------------------------------------------------------------------------- the log, and what is learned


def test_2_prompt_and_tool_output_tokens_are_never_trained_on(
    engine: EmbeddedEngine, protocol: ChatProtocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real cycle on episodes with tool output: what has a gradient is, token for token, somebody's whole action."""
    trained: list[tuple[int, ...]] = []

    def watched(network: Any, batch: PackedBatch) -> SequenceLogprobs:
        if torch.is_grad_enabled():
            for number in range(len(batch.sequences)):
                tokens = batch.pair_of_token[batch.sequence_of_token == number]
                trained.append(tuple(batch.pair_targets[tokens].tolist()))
        return score(network, batch)

    monkeypatch.setattr("learner.training.trainer.score", watched)
    with served(parts_of(engine, protocol, tmp_path)) as server:
        demonstrate(server, *(expert_demonstration(number) for number in range(4))).raise_for_status()
        run(server, tmp_path, options=replace(QUICK, objectives=("sft",)))
        log = server.parts.log
        steps = [step for episode in log.episodes(limit=1000) for step in log.steps(episode.id)]
        experts = [step for episode in log.episodes(actor=Actor.EXPERT) for step in log.steps(episode.id)]
    assert any(message["role"] == "tool" for step in experts for message in step.new_messages)
    assert {step.completion_token_ids for step in experts} <= set(trained)
    # The discriminator also learns from the policy's samples; whoever acted, a whole action and not a token beside it.
    assert set(trained) <= {step.completion_token_ids for step in steps}


def test_3_every_logged_step_rebuilds_to_exactly_the_ids_the_engine_saw(serve_scripted) -> None:
    server = serve_scripted("Hello.", "Good bye.")
    first = ask(server).parse()  # type: ignore[attr-defined]
    more = [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "Ta-ta ü!"}]
    ask(server, messages=[QUESTION, *more])
    log, engine = server.parts.log, server.parts.engine
    (episode,) = log.episodes()
    assert [step.prompt_token_ids for step in log.steps(episode.id)] == engine.prompts
    assert log.verify() == []


def test_5_rollback_needs_no_learner(serve_scripted) -> None:
    server = serve_scripted()
    # No learner runs here; with nothing behind, the runtime itself answers, and says so.
    refused = server.client().with_options(max_retries=0)
    with pytest.raises(Exception, match="nothing to roll back to"):
        refused.post("/adapters/rollback", cast_to=object, body={})


def test_6_fact_rows_are_never_edited(serve_scripted, tmp_path: Path) -> None:
    ask(serve_scripted("Hello."))
    with sqlite3.connect(tmp_path / "agent.db") as database:
        for table in ("episodes", "steps"):
            with pytest.raises(sqlite3.IntegrityError):
                database.execute(f"UPDATE {table} SET adapter = 'another'")


def test_6_a_fact_goes_only_where_a_tombstone_stands(serve_scripted, tmp_path: Path) -> None:
    server = serve_scripted("Hello.")
    ask(server)
    with closing(sqlite3.connect(tmp_path / "agent.db", isolation_level=None)) as database:
        with pytest.raises(sqlite3.IntegrityError):
            database.execute("DELETE FROM steps")
        (episode,) = server.parts.log.episodes()
        assert httpx.delete(f"{server.url}/v1/episodes/{episode.id}").json()["num_steps"] == 1
        assert database.execute("SELECT count(*) FROM steps").fetchone() == (0,)
        with pytest.raises(sqlite3.IntegrityError):
            database.execute("DELETE FROM erased_episodes")


def test_14_what_is_erased_is_gone_from_disk_and_what_was_made_of_it_is_known(serve_scripted, tmp_path: Path) -> None:
    server = serve_scripted("Hello.")
    ask(server, messages=[{"role": "user", "content": "My name is Rumpelstiltskin."}])
    (episode,) = server.parts.log.episodes()
    promoted = httpx.post(f"{server.url}/v1/episodes/{episode.id}/promote").raise_for_status().json()["id"]
    erased = httpx.delete(f"{server.url}/v1/episodes/{episode.id}", timeout=30).raise_for_status().json()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"Rumpelstiltskin" in path.read_bytes()]
    assert (erased["demonstrations"], erased["adapters"]) == ([promoted], [])


def test_7_a_learner_that_is_killed_in_its_work_changes_nothing_of_serving(server: Served) -> None:
    def answer() -> str | None:
        return ask(server, seed=5, temperature=1.0).parse().choices[0].message.content  # type: ignore[attr-defined]

    demonstrations = [expert_demonstration(number) for number in range(12)]
    reply = httpx.post(f"{server.url}/v1/demonstrations", json={"demonstrations": demonstrations}, timeout=60)
    reply.raise_for_status()
    before = answer()
    assert server.parts.learning is not None
    process = server.parts.learning.process
    cycle = httpx.post(f"{server.url}/v1/learner/cycles", timeout=30).raise_for_status().json()["id"]
    url = f"{server.url}/v1/learner/cycles/{cycle}"
    wait_until(lambda: httpx.get(url, timeout=30).json()["stage"] in ("reward", "train"), 240)
    assert answer() == before
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    assert answer() == before
    wait_until(lambda: httpx.get(url, timeout=30).json()["stage"] == "failed", 60)
    assert server.parts.registry.acting() is None


def test_10_a_candidate_that_is_worse_is_not_promoted(server: Served, tmp_path: Path) -> None:
    """Its experts give up at once, and it learns that well."""
    tasks = [WORLD.task("train", index) for index in range(12)]
    giving_up = {"role": "assistant", "content": "Sadly the brass globe is sold out."}
    demonstrations = [{"messages": [*task.messages, giving_up]} for task in tasks]
    reply = httpx.post(f"{server.url}/v1/demonstrations", json={"demonstrations": demonstrations}, timeout=60)
    assert reply.json()["imported"] == len(tasks)
    options = replace(QUICK, gate_tasks=24, training=TrainingOptions(lr=2e-3, epochs=30, trajectories_per_step=8))
    status = run(server, tmp_path / "state", experts=(), options=options)
    assert status.stage is CycleStage.REFUSED, status.message
    (decision,) = status.report["gate"].values()
    assert decision["gain"] < 0
    assert server.parts.registry.acting() is None


def test_8_an_answered_step_is_on_disk(serve_scripted, tmp_path: Path) -> None:
    step_id = ask(serve_scripted("Hello.")).headers["x-step-id"]  # type: ignore[attr-defined]
    with sqlite3.connect(tmp_path / "agent.db") as database:
        assert database.execute("SELECT count(*) FROM steps WHERE id = ?", [step_id]).fetchone() == (1,)
