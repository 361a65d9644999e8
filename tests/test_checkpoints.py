"""Checkpoints of every family that is served, through the code that reads real ones: from files to HTTP answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import BadRequestError
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from policies.adapters.base_network import BaseNetworkError, model_folder, read_base_network
from policies.adapters.probe import write_probe
from policies.chat.chat_protocol import ChatProtocol, ChatProtocolError, action_message, plain_message
from policies.chat.grammars import json_grammar, tool_call_grammar
from policies.chat.response_templates import FAMILIES, known_response_template
from policies.types import (
    Action,
    EngineLimits,
    FinalAnswer,
    FinishReason,
    MalformedAction,
    Message,
    SamplingParams,
    ToolCall,
    ToolCalls,
    ToolSchema,
)
from runtime.adapters.swap import Swap
from runtime.agent.tools import Toolbox
from runtime.config import Settings
from runtime.engines.embedded.engine import EmbeddedEngine
from runtime.store.adapter_registry import AdapterRegistry, AdapterState
from runtime.store.damage import StepLogError
from runtime.store.step_log import StepLog
from runtime.store.vocabulary import require_vocabulary
from serve import build_parts
from tests.grammar_checks import admits
from tests.records import make_episode, make_step
from tests.serving import MODEL, SayingEngine, Served, parts_of, served
from tests.tiny_adapters import randomise_lora, true_probe
from tests.tiny_checkpoints import CHECKPOINTS, Checkpoint

QUESTION: list[Message] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]
LOOK: ToolSchema = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at a place.",
        "parameters": {
            "type": "object",
            "properties": {"at": {"type": "string"}, "times": {"type": "integer"}},
            "required": ["at", "times"],
            "additionalProperties": False,
        },
    },
}
CALL = ToolCall("call_0123456789abcdef01234567", "look", {"at": "</tool_call> } é\n", "times": 2})
ANOTHER = ToolCall("call_76543210fedcba9876543210", "look", {"at": "", "times": 0})

# ------------------------------------------------------------------------------------------------ loading


class Loaded:
    """One family's checkpoint, read as a server reads it."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family: Checkpoint = CHECKPOINTS[family]
        self.folder = self.family.build(folder)
        self.protocol = ChatProtocol.load(self.folder)
        self.network = read_base_network(self.folder)

    @property
    def tools(self) -> tuple[ToolSchema, ...]:
        return (LOOK,) if self.family.takes_tools else ()

    def actions(self, call: ToolCall = CALL) -> Iterator[ToolCalls | FinalAnswer]:
        """Everything that this family's turns can be."""
        thoughts = ("Is it round?", "") if self.family.thinks else ("",)
        for thought in thoughts:
            yield FinalAnswer("It is a globe. Ça va?", thought)
            if self.family.takes_tools:
                for calls in [(call,), (call, ANOTHER)][: self.family.max_calls]:
                    yield ToolCalls(calls, "", thought)
                    if self.family.has_text_beside_calls:
                        yield ToolCalls(calls, "Let me look.", thought)

    def written(self, action: Action) -> tuple[int, ...]:
        return self.protocol.completion_of(QUESTION, action, self.tools)[1]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(request.param, tmp_path_factory.mktemp(request.param) / "a-model")


def families(are_so: Callable[[Checkpoint], bool]) -> pytest.MarkDecorator:
    """Only those families."""
    return pytest.mark.parametrize(
        "loaded", [name for name, family in CHECKPOINTS.items() if are_so(family)], indirect=True, scope="module"
    )


def without_ids(action: Action) -> Action:
    if not isinstance(action, ToolCalls):
        return action
    return ToolCalls(tuple(ToolCall("", c.name, c.arguments) for c in action.calls), action.text, action.reasoning)


def test_the_turns_end_is_a_stop_token_whatever_the_checkpoint_says(loaded: Loaded) -> None:
    token_of = loaded.protocol.tokenizer.convert_tokens_to_ids
    assert set(loaded.protocol.stop_token_ids) == set(map(token_of, {*loaded.family.stops, loaded.family.turn_end}))
    assert loaded.written(FinalAnswer("Yes."))[-1] == token_of(loaded.family.turn_end)


def test_its_shapes_are_named_as_peft_names_its_modules(loaded: Loaded) -> None:
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    network = AutoModelForCausalLM.from_pretrained(loaded.folder)
    modules = {name for name, module in network.named_modules() if name.rpartition(".")[2] in linear}
    assert len(modules) == 2 * len(linear)
    assert {f"{module}.weight" for module in modules} <= set(loaded.network.shapes)


async def test_the_embedded_engine_serves_what_transformers_and_peft_compute(loaded: Loaded, tmp_path: Path) -> None:
    adapter_folder = write_adapter(loaded, tmp_path / "adapter")
    engine = EmbeddedEngine(loaded.folder, tokenizer=loaded.protocol.tokenizer, device="cpu", num_threads=1)
    registry = AdapterRegistry(tmp_path / "agent.db")
    swap = Swap(engine, registry, loaded.network)
    try:
        prompt = loaded.protocol.render(QUESTION)
        sampling = SamplingParams(max_tokens=12, temperature=0)
        tokens = [token.token_id async for token in engine.generate(prompt, sampling, None)]
        network = AutoModelForCausalLM.from_pretrained(loaded.folder)
        options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
        ids = torch.tensor([prompt])
        expected = network.generate(ids, attention_mask=torch.ones_like(ids), **options, eos_token_id=None)
        assert tokens == expected[0, len(prompt) :].tolist()
        name = registry.register(adapter_folder).name
        await swap.promote(name)  # raises where the engine does not serve what PEFT wrote into the probe
        assert registry.state(name) is AdapterState.ACTING
    finally:
        await engine.close()
        registry.close()


def write_adapter(loaded: Loaded, folder: Path) -> Path:
    modules = ["q_proj", "v_proj", "down_proj"]
    network = AutoModelForCausalLM.from_pretrained(loaded.folder)
    model: Any = get_peft_model(network, LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM"))
    randomise_lora(model, 1)
    model.save_pretrained(str(folder))
    write_probe(folder, true_probe(model, loaded.network.fingerprint))
    return folder


# ------------------------------------------------------------------------------------- writing and reading


def test_what_the_template_writes_is_read_back_as_the_same_action(loaded: Loaded) -> None:
    for action in loaded.actions():
        completion = loaded.written(action)
        assert without_ids(loaded.protocol.parse(completion, tools=loaded.tools)) == without_ids(action)


def test_read_token_by_token_text_and_thinking_come_apart_as_they_come(loaded: Loaded) -> None:
    for action in loaded.actions():
        reader = loaded.protocol.reader(loaded.tools)
        deltas = [delta for token_id in loaded.written(action) for delta in reader.feed(token_id)]
        deltas += reader.finish(FinishReason.STOP)[1]
        said = {kind: "".join(d.text for d in deltas if d.kind == kind) for kind in ("text", "reasoning")}
        assert isinstance(action, ToolCalls | FinalAnswer)
        assert said == {"text": action.text, "reasoning": action.reasoning}


def test_prompt_and_completion_are_the_tokens_of_the_whole(loaded: Loaded) -> None:
    question = QUESTION[1:]  # Mistral's template moves the system's text about
    habits = loaded.protocol.traits.habits
    for action in loaded.actions(replace(CALL, arguments={"at": "} é\n", "times": 2})):
        prompt, completion = loaded.protocol.completion_of(question, action, loaded.tools)
        whole = loaded.protocol.tokenizer.apply_chat_template(
            [plain_message(message, habits) for message in (*question, action_message(action))],
            tools=list(loaded.tools) or None, tokenize=True, return_dict=False,
        )  # fmt: skip
        assert (*prompt, *completion) == tuple(whole)[: len(prompt) + len(completion)]


def test_a_conversation_extended_on_its_tokens_equals_the_whole_rendered(loaded: Loaded) -> None:
    for action in loaded.actions():
        prompt, completion = loaded.protocol.completion_of(QUESTION, action, loaded.tools)
        history, new = [*QUESTION, action_message(action)], what_comes_after(action)
        extended = loaded.protocol.extend(prompt + completion, history, new, loaded.tools)
        assert extended == loaded.protocol.render([*history, *new], loaded.tools)


def what_comes_after(action: Action) -> list[Message]:
    if isinstance(action, ToolCalls):
        return [{"role": "tool", "tool_call_id": call.id, "content": "seen"} for call in action.calls]
    return [{"role": "user", "content": "And now?"}]


@families(lambda family: family.takes_tools)
def test_calls_spaced_the_policys_own_way_are_continued_as_they_were_sampled(loaded: Loaded) -> None:
    thought = "Hm." if loaded.family.thinks else ""
    canonical = loaded.written(ToolCalls((CALL,), "", thought))
    sampled = loaded.protocol.encode(loaded.protocol.decode(canonical).replace('"times": 2', '"times":  2'))
    assert sampled != canonical
    action = loaded.protocol.parse(sampled, tools=loaded.tools)
    assert isinstance(action, ToolCalls)
    told = loaded.protocol.render(QUESTION, loaded.tools) + sampled
    history = [*QUESTION, action_message(action)]
    extended = loaded.protocol.extend(told, history, what_comes_after(action), loaded.tools)
    if loaded.family.moves_system_text:
        assert extended == loaded.protocol.render([*history, *what_comes_after(action)], loaded.tools)
    else:
        assert extended[: len(told)] == told


@families(lambda family: family.takes_tools)
def test_text_beside_calls_does_not_end_the_episode_where_the_template_has_no_place_for_it(loaded: Loaded) -> None:
    action = ToolCalls((CALL,), "Let me look.", "Hm." if loaded.family.thinks else "")
    prompt, completion = loaded.protocol.completion_of(QUESTION[1:], action, loaded.tools)
    told = (*prompt, *loaded.protocol.encode("Let me look. "), *completion)
    history = [*QUESTION[1:], action_message(action)]
    extended = loaded.protocol.extend(told, history, what_comes_after(action), loaded.tools)
    assert extended[: len(told)] == told, "what was sampled stays, with its text"


@families(lambda family: family.thinks)
def test_old_thinking_is_dropped_as_the_template_drops_it(loaded: Loaded) -> None:
    thoughtful = FinalAnswer("A globe.", "Is it round?")
    prompt, completion = loaded.protocol.completion_of(QUESTION, thoughtful)
    history = [*QUESTION, action_message(thoughtful)]
    extended = loaded.protocol.extend(prompt + completion, history, [{"role": "user", "content": "And now?"}])
    assert "round" not in loaded.protocol.decode(extended)
    call = ToolCalls((CALL,), "", "Is it round?")
    prompt, completion = loaded.protocol.completion_of(QUESTION, call, loaded.tools)
    extended = loaded.protocol.extend(
        prompt + completion, [*QUESTION, action_message(call)], what_comes_after(call), loaded.tools
    )
    assert extended[: len(prompt + completion)] == prompt + completion, "within one turn, thinking stays"


@pytest.mark.parametrize("cut", [1, 3, 9])
def test_a_turn_that_was_cut_off_is_an_action_all_the_same(loaded: Loaded, cut: int) -> None:
    for action in loaded.actions():
        cut_off = loaded.protocol.parse(loaded.written(action)[:-cut], FinishReason.LENGTH, loaded.tools)
        assert isinstance(cut_off, ToolCalls | FinalAnswer | MalformedAction)


@families(lambda family: family.takes_tools)
def test_a_call_can_be_required(loaded: Loaded) -> None:
    grammar = tool_call_grammar(loaded.protocol, loaded.tools)
    call = ToolCall("abcdefghi", "look", {"at": "the shelf, é\n", "times": 2})
    thought = "Is it?\nHm." if loaded.family.thinks else ""
    written = loaded.protocol.written(QUESTION, ToolCalls((call,), "", thought)).removesuffix(loaded.protocol.turn_end)
    written = written.replace(f', "id": "{call.id}"', "")
    assert admits(loaded.protocol, grammar, loaded.protocol.encode(written))
    assert admits(loaded.protocol, grammar, loaded.protocol.encode(written.replace(thought, "")))
    assert not admits(loaded.protocol, grammar, loaded.protocol.encode(written.replace("2", '"2"')))
    assert not admits(loaded.protocol, grammar, loaded.protocol.encode(written.replace("look", "gaze")))


def test_an_answer_can_be_held_to_a_schema_and_thinking_comes_before_it(loaded: Loaded) -> None:
    thought = "Is it?\nHm." if loaded.family.thinks else ""
    grammar = json_grammar(loaded.protocol, {"type": "integer"})
    written = loaded.protocol.written(QUESTION, FinalAnswer("17", thought)).removesuffix(loaded.protocol.turn_end)
    assert admits(loaded.protocol, grammar, loaded.protocol.encode(written))
    assert not admits(loaded.protocol, grammar, loaded.protocol.encode(written.replace("17", "seventeen")))
    if loaded.family.opening:
        assert not admits(loaded.protocol, grammar, loaded.protocol.encode("17")), "it would be read as a thought"


# --------------------------------------------------------------------------------------------- over HTTP


class FamilyEngine(SayingEngine):
    """Says actions as the family's policy would write them, in tokens."""

    def __init__(self, loaded: Loaded, *actions: Action) -> None:
        vocab_size = len(loaded.protocol.tokenizer)
        limits = EngineLimits(
            2048, max_adapters=3, max_rank=16, vocab_size=vocab_size, supports_grammar=True, logprob_tolerance=1e-3
        )
        super().__init__(loaded.protocol, *(loaded.written(action) for action in actions), limits=limits)


@pytest.fixture
def serve_family(loaded: Loaded, tmp_path: Path) -> Iterator[Any]:
    servers: list[Any] = []

    def serve(*actions: Action) -> Served:
        engine = FamilyEngine(loaded, *actions)
        parts = parts_of(engine, loaded.protocol, tmp_path, toolbox=Toolbox())
        servers.append(served(parts))
        return servers[-1].__enter__()

    yield serve
    for server in servers:
        server.__exit__(None, None, None)


@families(lambda family: family.takes_tools)
def test_an_episode_with_a_call_its_result_and_an_answer(loaded: Loaded, serve_family: Any) -> None:
    thought = "Is it round?" if loaded.family.thinks else ""
    server = serve_family(ToolCalls((CALL,), "", thought), FinalAnswer("A globe.", thought), FinalAnswer("Bye."))
    client, messages = server.client(), list[Any](QUESTION)
    first = client.chat.completions.create(model=MODEL, messages=messages, tools=[LOOK])  # type: ignore[list-item]
    said = first.choices[0].message
    assert said.tool_calls
    assert json.loads(said.tool_calls[0].function.arguments) == CALL.arguments  # type: ignore[union-attr]
    assert getattr(said, "reasoning_content", "") == thought
    messages += [
        said.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "?"},
    ]
    chunks = list(client.chat.completions.create(model=MODEL, messages=messages, tools=[LOOK], stream=True))  # type: ignore[call-overload]
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "A globe."
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == thought
    messages += [{"role": "assistant", "content": "A globe."}, {"role": "user", "content": "Thanks."}]
    client.chat.completions.create(model=MODEL, messages=messages, tools=[LOOK])  # type: ignore[list-item]
    (episode,) = server.parts.log.episodes()
    steps = server.parts.log.steps(episode.id)
    assert [step.index for step in steps] == [0, 1, 2], "one episode, stitched by its conversation"
    assert [tuple(step.prompt_token_ids) for step in steps] == server.parts.engine.prompts


@families(lambda family: not family.takes_tools)
def test_tools_for_a_model_that_takes_none_are_refused_with_a_sentence(loaded: Loaded, serve_family: Any) -> None:
    client = serve_family(FinalAnswer("Hi.")).client()
    with pytest.raises(BadRequestError, match="no words for tools"):
        client.chat.completions.create(model=MODEL, messages=QUESTION, tools=[LOOK])  # type: ignore[list-item]
    with pytest.raises(SystemExit, match="no words for tools"):
        build_parts(Settings(model=str(loaded.folder), tools=["calculator"]))


# -------------------------------------------------------------------------------- which response template


def test_every_family_is_known_by_its_chat_templates_marks_and_not_by_its_name() -> None:
    found = {name: known_response_template(checkpoint.chat_template) for name, checkpoint in CHECKPOINTS.items()}
    names = {id(family.template): family.name for family in FAMILIES}
    assert {name: names[id(template)].split()[0] for name, template in found.items()} == {
        "qwen2": "ChatML", "qwen2-base": "ChatML", "qwen3": "ChatML", "qwen3-thinking": "ChatML", "llama": "Llama",
        "mistral": "Mistral", "mistral-args": "Mistral", "gemma3": "Gemma",
    }  # fmt: skip
    assert known_response_template({"default": "", "tool_use": CHECKPOINTS["llama"].chat_template}) is found["llama"]


XML_CALL = "<tool_call>\n<function=look>\n<parameter=at>\nthe shelf\n</parameter>\n<parameter=times>\n2\n</parameter>\n"


def test_calls_in_xml_are_read_with_their_tools_types(tmp_path: Path) -> None:
    protocol = load_with_chat_template(tmp_path, CHECKPOINTS["qwen2"].chat_template + "{#- <function= #}")
    action = protocol.parse(protocol.encode(f"Well.\n{XML_CALL}</function>\n</tool_call><|im_end|>"), tools=[LOOK])
    assert without_ids(action) == ToolCalls((ToolCall("", "look", {"at": "the shelf", "times": 2}),), "Well.")


def load_with_chat_template(folder: Path, chat_template: str, **files: Path) -> ChatProtocol:
    CHECKPOINTS["qwen2"].build(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return ChatProtocol.load(folder, **files)


PLAIN = """\
{%- for message in messages -%}{{ '<' + message.role + '>' + message.content + '<|im_end|>' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<assistant>' }}{%- endif -%}
"""


def test_an_unknown_chat_template_is_refused_at_start_with_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(ChatProtocolError, match="--response-template FILE"):
        load_with_chat_template(tmp_path / "model", PLAIN)
    with pytest.raises(SystemExit, match=r"cannot start: .*--response-template FILE"):
        build_parts(Settings(model=str(tmp_path / "model"), state=tmp_path / "state"))


def test_a_log_of_another_tokenizers_tokens_is_not_gone_on_with(tmp_path: Path, protocol: ChatProtocol) -> None:
    """A server that was started with another model rendered what it continued from the old one's ids: other words, or a
    503 for an id that the model does not have; and a learner would have trained on them."""
    log = StepLog(tmp_path / "agent.db")
    other = CHECKPOINTS["qwen2"].build(tmp_path / "other")
    fingerprint = protocol.vocabulary_fingerprint
    for noted in (1, 2, fingerprint):  # as long as nothing is logged, any model may be tried
        require_vocabulary(tmp_path / "agent.db", noted, "novice")
    episode = make_episode()
    log.append(episode, make_step(episode)).result()
    require_vocabulary(tmp_path / "agent.db", fingerprint, "novice")
    log.close()
    with pytest.raises(SystemExit, match=r"cannot start: .*the tokens of another model .*another --state"):
        build_parts(Settings(model=str(other), state=tmp_path))


def test_a_log_of_an_older_release_is_taken_for_the_models_own(tmp_path: Path) -> None:
    log, episode = StepLog(tmp_path / "agent.db"), make_episode()
    log.append(episode, make_step(episode)).result()
    log.close()
    require_vocabulary(tmp_path / "agent.db", 5, "novice")
    with pytest.raises(StepLogError, match="another model than qwen"):
        require_vocabulary(tmp_path / "agent.db", 6, "qwen")


def test_a_response_template_can_be_given(tmp_path: Path) -> None:
    template = {"start_anchor": "<assistant>", "fields": {"content": {"close": "<|im_end|>", "content": "text"}}}
    (tmp_path / "template.json").write_text(json.dumps(template))
    protocol = load_with_chat_template(tmp_path / "model", PLAIN, response_template_file=tmp_path / "template.json")
    assert protocol.parse(protocol.encode("A globe.<|im_end|>")) == FinalAnswer("A globe.")
    settings = Settings(
        model=str(tmp_path / "model"), state=tmp_path / "state", response_template=tmp_path / "template.json"
    )
    parts = build_parts(settings)
    assert parts.protocol.parse(protocol.encode("A globe.<|im_end|>")) == FinalAnswer("A globe.")
    asyncio.run(parts.engine.close())
    parts.log.close()
    parts.registry.close()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "Expecting"),
        ("[]", "no JSON object"),
        ("{}", "fields"),
        ('{"start_anchor": "x", "fields": {"a": 3}}', "dict"),
    ],
)
def test_a_response_template_that_is_none_is_refused_with_what_is_wrong(
    tmp_path: Path, content: str, problem: str
) -> None:
    (tmp_path / "template.json").write_text(content)
    CHECKPOINTS["qwen2"].build(tmp_path / "model")
    with pytest.raises(ValueError, match=problem):
        ChatProtocol.load(tmp_path / "model", tmp_path / "template.json")


def test_the_tokenizers_own_response_template_goes_before_a_known_one(tmp_path: Path) -> None:
    CHECKPOINTS["qwen3"].build(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    # As some on the hub name it.
    fields = {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "content": {"close": "<|im_end|>", "content": "text"},
    }
    tokenizer.response_template = {"start_anchor": "<|im_start|>assistant\n", "fields": fields}
    tokenizer.save_pretrained(tmp_path)
    protocol = ChatProtocol.load(tmp_path)
    written = "<think>Hm.</think><tool_call></tool_call><|im_end|>"
    assert protocol.parse(protocol.encode(written)) == FinalAnswer("<tool_call></tool_call>", "Hm.")


def test_a_turn_that_ends_with_plain_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ChatProtocolError, match="does not begin with a token of its own"):
        load_with_chat_template(tmp_path, CHECKPOINTS["qwen2"].chat_template.replace("<|im_end|>", "\\n###"))


# ------------------------------------------------------------------------------------------------- by name


def test_a_hub_name_is_found_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--org--a-model" / "snapshots" / ("0" * 40)
    CHECKPOINTS["qwen2"].build(snapshot)
    (tmp_path / "models--org--a-model" / "refs").mkdir()
    (tmp_path / "models--org--a-model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert model_folder("org/a-model") == snapshot
    assert read_base_network(model_folder("org/a-model")) == read_base_network(snapshot)
    assert model_folder(str(snapshot)) == snapshot
    with pytest.raises(BaseNetworkError, match="org/another is no folder, and cannot be brought"):
        model_folder("org/another")
    with pytest.raises(BaseNetworkError, match="is no folder"):
        model_folder("/no/such/folder")
