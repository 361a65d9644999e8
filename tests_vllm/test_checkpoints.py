"""vLLM reads a small checkpoint of each family, and serves what transformers and PEFT compute with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from policies.adapters.base_network import read_base_network
from policies.adapters.files import AdapterRefused
from policies.adapters.probe import HALF_TOLERANCE
from policies.chat.chat_protocol import ChatProtocol
from policies.chat.grammars import tool_call_grammar
from policies.novice.build import NOVICE_PATH
from policies.types import FinishReason, MalformedAction, SamplingParams, ToolCalls
from runtime.adapters.swap import Swap
from runtime.store.adapter_registry import AdapterRegistry, AdapterState
from tests.tiny_checkpoints import CHECKPOINTS
from tests.trained_adapters import trained_in_32_bits
from tests_vllm.novice_adapters import NoviceAdapters, complete, engine_on, ids_of, rewrite

QUESTION = [{"role": "user", "content": "What is it?"}]
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"times": {"enum": [1, 2, 3]}},
            "required": ["times"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("family", sorted(CHECKPOINTS))
async def test_a_familys_checkpoint_is_served_with_adapters_and_required_calls(family: str, tmp_path: Path):
    folder = CHECKPOINTS[family].build(tmp_path / "model")
    protocol, networks = ChatProtocol.load(folder), NoviceAdapters(folder, tmp_path / "adapters")
    prompt = protocol.render(QUESTION)
    async with engine_on(folder, max_batch_size=4) as engine:
        tokens = await complete(engine, prompt, SamplingParams(max_tokens=16, temperature=0))
        networks.expect(None, prompt, tokens)
        networks.expect_likeliest(None, prompt, tokens)
        registry = AdapterRegistry(tmp_path / "agent.db")
        name = registry.register(networks.adapter(2).path).name
        await Swap(engine, registry, read_base_network(folder)).promote(name)
        assert registry.state(name) is AdapterState.ACTING
        tokens = await complete(engine, prompt, SamplingParams(max_tokens=16, temperature=0), registry.acting())
        networks.expect(networks.adapter(2), prompt, tokens)
        if CHECKPOINTS[family].takes_tools:
            sampling = SamplingParams(
                max_tokens=200,
                seed=1,
                grammar=tool_call_grammar(protocol, [LOOK]),
                stop_token_ids=protocol.stop_token_ids,
            )
            tokens = await complete(engine, protocol.render(QUESTION, [LOOK]), sampling)
            action = protocol.parse(ids_of(tokens), FinishReason.STOP, [LOOK])
            # A network of random weights may think up to its limit; otherwise it has called.
            if tokens[-1].finish_reason is FinishReason.STOP or not CHECKPOINTS[family].thinks:
                assert isinstance(action, ToolCalls), json.dumps(protocol.decode(ids_of(tokens)))
                assert action.calls[0].arguments["times"] in (1, 2, 3)
            else:
                assert not isinstance(action, MalformedAction)


async def test_what_was_trained_in_32_bits_is_verified_when_served_in_16_and_the_base_is_not(tmp_path: Path):
    """A learner on the CPU once made adapters that an engine in bfloat16 refused, one and all."""
    path, unchanged = trained_in_32_bits(tmp_path), tmp_path / "unchanged"
    async with engine_on(NOVICE_PATH, max_batch_size=4, engine_args={"dtype": "bfloat16"}) as engine:
        assert engine.limits.logprob_tolerance == HALF_TOLERANCE
        registry = AdapterRegistry(tmp_path / "agent.db")
        swap = Swap(engine, registry, read_base_network(NOVICE_PATH))
        trained = registry.register(path).name
        await swap.promote(trained)
        assert registry.state(trained) is AdapterState.ACTING
        shutil.copytree(path, unchanged)
        rewrite(unchanged, lambda tensor: tensor * 0.0)
        with pytest.raises(AdapterRefused, match="it is what the base network says"):
            await swap.promote(registry.register(unchanged).name)
