"""The server's options, each documented once: from the command line, STEPAGENT_* variables, or a TOML file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ByteSize, Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from policies.command_line import Options, parse, split_commas
from runtime import __version__

if TYPE_CHECKING:
    from runtime.agents import AgentsFile

NOVICE = "policies/novice_model"


class Settings(Options):
    """Serve an agent over OpenAI-compatible HTTP and log every step it takes.

    Every option can also be given as an environment variable (--tool-timeout is STEPAGENT_TOOL_TIMEOUT) or as a key
    of a TOML file (tool_timeout), named by STEPAGENT_CONFIG or else stepagent.toml in the working directory.
    """

    model_config = SettingsConfigDict(env_prefix="STEPAGENT_")

    host: str = "127.0.0.1"
    """Address to listen on. One that others can reach needs an API key."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    state: Path = Path("state")
    """Folder of the step log (agent.db) and the adapters; made if missing."""
    engine: Literal["embedded", "vllm"] = "embedded"
    """What runs the model: embedded (transformers + PEFT, CPU or GPU) or vllm."""
    engine_arg: dict[str, str | int | float | bool | list[Any] | dict[str, Any]] = Field(default_factory=dict)
    """Passed on to vLLM, by the names of its command line: tensor_parallel_size=2. Repeat for more."""
    model: str = NOVICE
    """Folder (or hub name) of the base model; the default is the novice that comes with this repository."""
    served_name: str = ""
    """Model name that clients see; empty takes the model folder's name."""
    agents: Path | None = None
    """TOML file of named agents, each with its own prompt, tools, demonstrations and adapters (docs/AGENTS.md)."""
    response_template: Path | None = None
    """JSON file of a response template, which reads the model's tool calls and thinking; default: the model's own, or
    a known one that fits its chat template."""
    api_key: SecretStr | None = Field(None, min_length=1)
    """The admin key, from STEPAGENT_API_KEY or the TOML file, never from the command line; unset, and none made by
    `python -m runtime.keys`: nobody is asked for one."""
    api_key_file: Path | None = None
    """File that holds the admin key."""
    keep_days: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Erase the policy's own episodes so many days after their last step; unset: never."""
    keep_gb: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Erase the oldest of them where the log takes more; unset: never. Demonstrations stay in any case."""
    redact_secrets: Literal["on", "off"] = "on"
    """Replace keys, tokens and passwords of known shapes in what clients and tools say, before it is rendered or
    logged."""
    redact: Annotated[list[str], NoDecode] = Field(default_factory=list)
    """Functions that replace more, text to text, by import path: package.module:function. Repeat or separate by
    commas."""
    cors_origins: Annotated[list[str], NoDecode] = Field(default_factory=list)
    """Origins of web pages that may use this server: https://chat.example.org. Repeat or separate by commas."""
    shutdown_grace: float = Field(10.0, ge=0, allow_inf_nan=False)
    """Seconds that running requests get to finish when the server is told to end."""
    world: str | None = None
    """World whose tasks the server knows and whose tools it runs; empty for none. Default: order_desk for the novice,
    none for any other model."""
    run_tools: Literal["always", "asked"] = "always"
    """When the server runs its own tools: for every request without `tools`, or only for those that ask for it by the
    header `x-stepagent-tools: server`."""
    tools: Annotated[list[str], NoDecode] = Field(default_factory=list)
    """Tools that the server runs for the agent: calculator, search, package.module:object (a LangChain tool, a list of
    them, or a function that returns either), or a table [tools.NAME] of --agents. Repeat or separate by commas."""
    search_corpus: Path | None = None
    """JSONL file of {"title", "text"} objects for the search tool."""
    max_steps: int | None = Field(None, ge=1, le=1000)
    """Most steps of one run of server-run tools; default: as many as the world gives its tasks, 16 without one."""
    max_run_tokens: int = Field(8192, ge=1)
    """Most tokens that the policy may write in one run."""
    deadline: float = Field(300.0, gt=0, allow_inf_nan=False)
    """Most seconds of one run."""
    tool_timeout: float = Field(30.0, gt=0, allow_inf_nan=False)
    """Most seconds of one tool call, where its table in --agents names none."""
    max_context: int | None = Field(None, ge=16)
    """Most tokens of prompt and answer together; default: what the model allows."""
    max_batch_size: int = Field(32, ge=1, le=1024)
    """Completions in the batch at a time; more wait."""
    max_adapters: int | None = Field(None, ge=4)
    """Most adapters in the engine at a time; default: as many as the agents need. On a GPU each takes some memory."""
    max_waiting: int = Field(1000, ge=0)
    """Requests that wait for a place in the batch; more are answered 429."""
    threads: int | None = Field(None, ge=1)
    """Threads of the engine's arithmetic on a CPU; default: the engine's own choice."""
    kv_memory: ByteSize | None = Field(None, ge=1)
    """Most memory for keys and values, such as 2GiB; it bounds the context. Default: a quarter of what is free."""
    precision: Literal["auto", "measured", "float32", "bfloat16"] = "auto"
    """Numbers that the embedded engine computes in: auto is float32 on a CPU, the model's own on a GPU; measured takes
    on a CPU what is faster there. Adapters that were trained in float32 may be refused beside 16 bits."""
    best_of: int = Field(1, ge=1, le=64)
    """Actions that are drawn at each step of a served request that says nothing of it (header x-stepagent-best-of); one
    of them is chosen and answered, all are logged. 1: the first one is the answer."""
    best_of_most: int = Field(8, ge=1, le=64)
    """Most of them that a request may ask for."""
    best_of_by: Literal["auto", "discriminator", "mean_logprob", "majority"] = "auto"
    """What chooses: the reward model of the cycle that made the acting adapter, how sure the policy was, or how many
    draws mean the same; auto: the first of these that there is. Where there is no reward model yet, discriminator
    chooses as auto, and says so in the log."""
    learn_every: int = Field(200, ge=0)
    """Start a learning cycle by itself after so many new episodes; 0: only when asked."""
    promote: Literal["auto", "canary", "ask"] = "auto"
    """What passed the gate: acts at once; serves a share of the new episodes first; or waits for somebody's yes
    (python -m learner approve)."""
    learn: Literal["on", "dry-run"] = "on"
    """dry-run: cycles run and are reported, and nothing is ever promoted."""
    canary_share: float = Field(0.1, gt=0, le=1)
    """Of the new episodes, with --promote canary."""
    approval_days: float = Field(14.0, gt=0, allow_inf_nan=False)
    """Days that a candidate waits for somebody's yes."""
    learner_arg: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Passed on to python -m learner, by the names of its command line: objectives=sft,implicit. Repeat for more."""
    demonstrations: Annotated[list[Path], NoDecode] = Field(default_factory=list)
    """Files of expert demonstrations to import once the server is up. Repeat or separate by commas."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """How much the server prints while it serves."""

    @property
    def world_name(self) -> str:
        """The world that is served; empty for none."""
        if self.world is None:
            return "order_desk" if Path(self.model).resolve() == Path(NOVICE).resolve() else ""
        return self.world

    @cached_property
    def agents_file(self) -> AgentsFile:
        """What --agents says; nobody where it is not given. Raises AgentsFileProblem."""
        from runtime.agents import NOBODY, read_agents

        return NOBODY if self.agents is None else read_agents(self.agents)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, _config_file())

    @field_validator("tools", "demonstrations", "cors_origins", "redact", mode="before")
    @classmethod
    def _split_commas(cls, given: object) -> list[str]:
        return split_commas(given)

    @field_validator("demonstrations")
    @classmethod
    def _must_exist(cls, files: list[Path]) -> list[Path]:
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file} is not a file")
        return files

    @field_validator("cors_origins")
    @classmethod
    def _must_be_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if not re.fullmatch(r"https?://[^/*\s]+", origin):
                raise ValueError(f"{origin!r} is no origin of a web page: write it as https://chat.example.org")
        return origins

    @model_validator(mode="after")
    def _guard_public_bind(self) -> Settings:
        if self.api_key or self.api_key_file or is_loopback(self.host):
            return self
        from runtime.store.keys import has_keys

        if not has_keys(self.state / "agent.db"):
            raise ValueError(
                f"host {self.host} can be reached by others: set an API key (STEPAGENT_API_KEY, or --api-key-file "
                "FILE), or use 127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _check_key_file(self) -> Settings:
        if self.api_key_file is None:
            return self
        if self.api_key is not None:
            raise ValueError("an API key and a file of one are both given: leave one of them out")
        try:
            key = self.api_key_file.read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            raise ValueError(f"api_key_file {self.api_key_file} cannot be read: {error}") from error
        if not key:
            raise ValueError(f"api_key_file {self.api_key_file} is empty: write the key into it")
        return self

    @model_validator(mode="after")
    def _check_best_of(self) -> Settings:
        if "best_of_most" in self.model_fields_set and self.best_of_most < self.best_of:
            raise ValueError(
                f"best_of_most {self.best_of_most} is below best_of {self.best_of}: a request that says nothing draws "
                "more than one may ask for"
            )
        return self

    @model_validator(mode="after")
    def _keep_keys_out_of_arguments(self) -> Settings:
        if any("key" in name for name in self.learner_arg):
            raise ValueError("learner_arg shows a key to every user of this machine: the learner has one of its own")
        return self


def _config_file() -> Path:
    """Raises FileNotFoundError for a file that is named but is not there."""
    named = os.environ.get("STEPAGENT_CONFIG")
    if named and not Path(named).is_file():
        raise FileNotFoundError(f"STEPAGENT_CONFIG names {named}, which is not a file")
    return Path(named or "stepagent.toml")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def parse_settings(arguments: list[str]) -> Settings:
    """Settings from the command line, the environment and the TOML file, in this order of precedence.

    Ends the process with a sentence on stderr and exit code 2 where a value is wrong; `--version` prints and ends it.
    """
    if "--version" in arguments:
        print(f"StepAgent {__version__}")
        raise SystemExit(0)
    source = os.environ.get("STEPAGENT_CONFIG", "stepagent.toml")
    return parse(Settings, list(_with_whole_values(arguments)), "python serve.py", source)


_OF_TABLES = ("--learner-arg", "--engine-arg")


def _with_whole_values(arguments: list[str]) -> Iterator[str]:
    """NAME=VALUE of a table as JSON: pydantic-settings splits it at commas otherwise, also those of the value."""
    before = ""
    for argument in arguments:
        option, _, given = argument.partition("=")
        if before in _OF_TABLES:
            yield _as_json(argument)
        elif option in _OF_TABLES and given:
            yield f"{option}={_as_json(given)}"
        else:
            yield argument
        before = argument


def _as_json(given: str) -> str:
    name, has_value, value = given.partition("=")
    return json.dumps({name: value}) if has_value and not given.startswith("{") else given
