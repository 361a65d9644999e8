"""Checkpoints as the hub has them, but tiny and of random weights: one of each model family that is served.

Each has its family's architecture, kind of tokenizer, special tokens, chat template and generation settings, and, like
most, no response template. The chat templates are written anew, shorter, after those of the families: same marks, same
order, same refusals, same treatment of old thinking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

NUM_ROUND_UP = 64
"""Embeddings have a few rows more than the tokenizer has tokens, as real ones do."""

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}

# ------------------------------------------------------------------------------------------- chat templates

_CHATML_TOOLS = """\
{%- if tools %}
  {{- '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') }}
  {{- '# Tools\\n\\nSignatures within <tools></tools>:\\n<tools>' }}
  {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
  {{- '\\n</tools>\\n\\nCall one as <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
  {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
"""

_CHATML_CALLS = """\
    {%- for call in message.tool_calls or [] %}
      {%- if not loop.first or has_text %}{{- '\\n' }}{%- endif %}
      {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
      {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
"""

_CHATML_RESULTS = """\
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
    {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
"""

QWEN_2 = f"""\
{_CHATML_TOOLS}
{{%- for message in messages %}}
  {{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}}
    {{{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}}}
  {{%- elif message.role == 'assistant' %}}
    {{%- set has_text = message.content != '' %}}
    {{{{- '<|im_start|>assistant\\n' + message.content }}}}
{_CHATML_CALLS}
  {{%- elif message.role == 'tool' %}}
{_CHATML_RESULTS}
  {{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{- '<|im_start|>assistant\\n' }}}}{{%- endif %}}
"""

# Thinking is written for the turns after the last question only; the last turn gets its marks even where it is empty.
QWEN_3 = f"""\
{_CHATML_TOOLS}
{{%- set last = namespace(question=-1) %}}
{{%- for message in messages %}}
  {{%- if message.role == 'user' %}}{{%- set last.question = loop.index0 %}}{{%- endif %}}
{{%- endfor %}}
{{%- for message in messages %}}
  {{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}}
    {{{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}}}
  {{%- elif message.role == 'assistant' %}}
    {{%- set has_text = message.content != '' %}}
    {{%- set thought = message.reasoning_content or '' %}}
    {{{{- '<|im_start|>assistant\\n' }}}}
    {{%- if loop.index0 > last.question and (loop.last or thought) %}}
      {{{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}}}
    {{%- endif %}}
    {{{{- message.content }}}}
{_CHATML_CALLS}
  {{%- elif message.role == 'tool' %}}
{_CHATML_RESULTS}
  {{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{- '<|im_start|>assistant\\n' }}}}{{%- endif %}}
"""

QWEN_3_ALWAYS_THINKING = QWEN_3.replace(
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}",
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}",
)

# Tools stand in the first question; a turn is one call or one text.
LLAMA_3 = """\
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none and tools %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- 'Cutting Knowledge Date: December 2023\\n\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content | trim }}{%- set messages = messages[1:] %}{%- endif %}
{{- '<|eot_id|>' }}
{%- if tools is not none and tools %}
  {{- '<|start_header_id|>user<|end_header_id|>\\n\\nRespond with {"name": ..., "parameters": ...}.\\n\\n' }}
  {%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}
  {{- messages[0].content | trim + '<|eot_id|>' }}
  {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
  {%- if message.role == 'tool' %}
    {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content | tojson + '<|eot_id|>' }}
  {%- elif 'tool_calls' in message %}
    {%- if message.tool_calls | length != 1 %}{{- raise_exception('single tool-calls only') }}{%- endif %}
    {%- set call = message.tool_calls[0].function %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
    {{- call.arguments | tojson + '}<|eot_id|>' }}
  {%- else %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

# Roles alternate, tools stand before the last question, ids have nine characters, and nothing opens the policy's turn.
_MISTRAL_HEAD = """\
{%- if messages[0].role == 'system' %}
  {%- set system = messages[0].content + '\\n\\n' %}{%- set messages = messages[1:] %}
{%- else %}
  {%- set system = '' %}
{%- endif %}
{%- set questions = messages | selectattr('role', 'equalto', 'user') | list %}
{%- set turn = namespace(index=0) %}
{%- for message in messages %}
  {%- if message.tool_calls and message.content %}{{- raise_exception('content or tool calls, not both') }}{%- endif %}
  {%- if message.role != 'tool' and not message.tool_calls %}
    {%- if (message.role == 'user') != (turn.index % 2 == 0) %}{{- raise_exception('must alternate') }}{%- endif %}
    {%- set turn.index = turn.index + 1 %}
  {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages %}
  {%- set calls = message.tool_calls or [] %}
  {%- set ids = [message.tool_call_id] if message.role == 'tool' else calls | map(attribute='id') %}
  {%- for id in ids %}
    {%- if id | length != 9 %}{{- raise_exception('Tool call IDs are nine letters and digits') }}{%- endif %}
  {%- endfor %}
"""

MISTRAL_3 = f"""\
{_MISTRAL_HEAD}
  {{%- if message.role == 'user' %}}
    {{%- if tools and message == questions[-1] %}}
      {{{{- '[AVAILABLE_TOOLS] ' + tools | list | tojson + '[/AVAILABLE_TOOLS]' }}}}
    {{%- endif %}}
    {{{{- '[INST] ' + (system if loop.last else '') + message.content + '[/INST]' }}}}
  {{%- elif message.tool_calls %}}
    {{{{- '[TOOL_CALLS] [' }}}}
    {{%- for call in message.tool_calls %}}
      {{{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}}' + (']' if loop.last else ', ') }}}}
    {{%- endfor %}}
    {{{{- eos_token }}}}
  {{%- elif message.role == 'assistant' %}}
    {{{{- ' ' + message.content | trim + eos_token }}}}
  {{%- else %}}
    {{{{- '[TOOL_RESULTS] {{"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}}' }}}}
    {{{{- '[/TOOL_RESULTS]' }}}}
  {{%- endif %}}
{{%- endfor %}}
"""

MISTRAL_11 = f"""\
{_MISTRAL_HEAD.replace("message.tool_calls and message.content", "false")}
  {{%- if loop.first and system %}}{{{{- '[SYSTEM_PROMPT]' + system | trim + '[/SYSTEM_PROMPT]' }}}}{{%- endif %}}
  {{%- if message.role == 'user' %}}
    {{%- if tools and message == questions[-1] %}}
      {{{{- '[AVAILABLE_TOOLS]' + tools | list | tojson + '[/AVAILABLE_TOOLS]' }}}}
    {{%- endif %}}
    {{{{- '[INST]' + message.content + '[/INST]' }}}}
  {{%- elif message.role == 'assistant' %}}
    {{{{- message.content }}}}
    {{%- for call in message.tool_calls or [] %}}
      {{{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}}}
    {{%- endfor %}}
    {{{{- eos_token }}}}
  {{%- else %}}
    {{{{- '[TOOL_RESULTS]' + message.tool_call_id + '[TOOL_CONTENT]' + message.content + '[/TOOL_RESULTS]' }}}}
  {{%- endif %}}
{{%- endfor %}}
"""

# No word of tools, and no system role: its text goes before the first question.
GEMMA_3 = """\
{{ bos_token }}
{%- if messages[0].role == 'system' -%}
  {%- set system = messages[0].content + '\\n\\n' -%}{%- set messages = messages[1:] -%}
{%- else -%}
  {%- set system = '' -%}
{%- endif -%}
{%- for message in messages -%}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('must alternate') }}{%- endif -%}
  {{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
  {{- (system if loop.first else '') + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

# --------------------------------------------------------------------------------------------- tokenizers


def byte_level(special: Sequence[str], words: Sequence[str] = (), bos: str | None = None) -> Tokenizer:
    """As Qwen's and Llama 3's: bytes written as letters, special tokens and words behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, special, words)
    if bos is not None:
        _begin_with(tokenizer, bos)
    return tokenizer


def sentence_pieces(special: Sequence[str], bos: str, has_prefix_space: bool) -> Tokenizer:
    """As Mistral's and Gemma's: a letter for the space, and bytes for what is in no piece."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127)), "▁"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    ending: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix_space:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        ending.append(decoders.Strip(content=" ", left=1, right=0))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(ending)
    _add_tokens(tokenizer, special, ())
    _begin_with(tokenizer, bos)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, special: Sequence[str], words: Sequence[str]) -> None:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in words])


def _begin_with(tokenizer: Tokenizer, bos: str) -> None:
    """What is encoded begins with this token, unless that is asked not to be: the chat template writes it too."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


CHATML_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CALL_MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
LLAMA_MARKS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
LLAMA_MARKS += ("<|eom_id|>", "<|eot_id|>", "<|python_tag|>")
MISTRAL_MARKS = ("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]")
MISTRAL_MARKS += ("[/TOOL_RESULTS]", "[TOOL_CALLS]")
MISTRAL_11_MARKS = (*MISTRAL_MARKS, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[ARGS]", "[TOOL_CONTENT]")
GEMMA_MARKS = ("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>")


# -------------------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """What tells one family's checkpoints from another's."""

    config: Callable[..., PreTrainedConfig]
    tokenizer: Callable[[], Tokenizer]
    chat_template: str
    eos: str
    """The tokenizer's own end token."""
    stops: tuple[str, ...]
    """End tokens of generation_config.json."""
    turn_end: str
    """What ends the policy's turn; not always among those two."""
    pad: str
    bos: str | None = None
    takes_tools: bool = True
    max_calls: int = 2
    """Calls that a turn may make."""
    has_text_beside_calls: bool = True
    """Its template writes it; else, it leaves it out, or refuses a message with both."""
    thinks: bool = False
    moves_system_text: bool = False
    """Its template writes the system's text at the last question only: a conversation that goes on is written anew."""
    opening: str = ""
    """What the chat template writes of the policy's turn itself, beside its role."""

    def build(self, folder: Path, seed: int = 0) -> Path:
        """Write the checkpoint, as `save_pretrained` does."""
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=self.tokenizer(), eos_token=self.eos, pad_token=self.pad, bos_token=self.bos,
            chat_template=self.chat_template, clean_up_tokenization_spaces=False,
        )  # fmt: skip
        config = self.config(
            **SIZES,
            vocab_size=-(-len(tokenizer) // NUM_ROUND_UP) * NUM_ROUND_UP,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(3.0)  # sharper distributions: what is wrong shows in the logprobs
        stops = tokenizer.convert_tokens_to_ids(list(self.stops))
        network.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder


def gemma_config(**settings: Any) -> Gemma3TextConfig:
    layers = ["sliding_attention", "full_attention"]
    return Gemma3TextConfig(**settings, sliding_window=64, layer_types=layers, query_pre_attn_scalar=32)


def mistral_config(**settings: Any) -> MistralConfig:
    return MistralConfig(**settings, sliding_window=None)


QWEN: dict[str, Any] = {"eos": "<|im_end|>", "pad": "<|endoftext|>", "turn_end": "<|im_end|>"}
QWEN |= {"stops": ("<|im_end|>", "<|endoftext|>")}
MISTRAL: dict[str, Any] = {"eos": "</s>", "stops": ("</s>",), "turn_end": "</s>", "pad": "</s>", "bos": "<s>"}

CHECKPOINTS = {
    "qwen2": Checkpoint(Qwen2Config, lambda: byte_level(CHATML_MARKS, CALL_MARKS), QWEN_2, **QWEN),
    # Taught to chat, but saved with the settings of its base network: the turn's end is no end token of its own.
    "qwen2-base": Checkpoint(
        Qwen2Config, lambda: byte_level(CHATML_MARKS, CALL_MARKS), QWEN_2, eos="<|endoftext|>",
        stops=("<|endoftext|>",), turn_end="<|im_end|>", pad="<|endoftext|>",
    ),
    "qwen3": Checkpoint(
        Qwen3Config, lambda: byte_level(CHATML_MARKS, (*CALL_MARKS, "<think>", "</think>")), QWEN_3, thinks=True, **QWEN
    ),
    "qwen3-thinking": Checkpoint(
        Qwen3Config, lambda: byte_level(CHATML_MARKS, (*CALL_MARKS, "<think>", "</think>")), QWEN_3_ALWAYS_THINKING,
        thinks=True, opening="<think>\n", **QWEN,
    ),
    "llama": Checkpoint(
        LlamaConfig, lambda: byte_level(LLAMA_MARKS, bos="<|begin_of_text|>"), LLAMA_3, eos="<|eot_id|>",
        stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), turn_end="<|eot_id|>", pad="<|eot_id|>",
        bos="<|begin_of_text|>", max_calls=1, has_text_beside_calls=False,
    ),
    "mistral": Checkpoint(
        mistral_config, lambda: sentence_pieces(MISTRAL_MARKS, "<s>", has_prefix_space=True), MISTRAL_3,
        has_text_beside_calls=False, moves_system_text=True, **MISTRAL,
    ),
    "mistral-args": Checkpoint(
        mistral_config, lambda: byte_level(MISTRAL_11_MARKS, bos="<s>"), MISTRAL_11, **MISTRAL
    ),
    "gemma3": Checkpoint(
        gemma_config, lambda: sentence_pieces(GEMMA_MARKS, "<bos>", has_prefix_space=False), GEMMA_3, eos="<eos>",
        stops=("<eos>", "<end_of_turn>"), turn_end="<end_of_turn>", pad="<pad>", bos="<bos>", takes_tools=False,
    ),
}  # fmt: skip
