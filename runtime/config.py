"""The server's options, each documented once: from the command line, STEPAGENT_* variables, or a TOML file."""

from __future__ import annotations

import os
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from policies.command_line import Options, parse, split_commas
from runtime import __version__


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
    model: str = "policies/novice_model"
    """Folder (or hub name) of the base model; the default is the novice that comes with this repository."""
    served_name: str = ""
    """Model name that clients see; empty takes the model folder's name."""
    response_template: Path | None = None
    """JSON file of a response template, which reads the model's tool calls and thinking; default: the model's own, or
    a known one that fits its chat template."""
    api_key: SecretStr | None = Field(None, min_length=1)
    """Clients must send it as a bearer token; unset: none is asked for."""
    world: str = "order_desk"
    """World whose tasks the server knows and whose tools it runs; empty for none."""
    tools: Annotated[list[str], NoDecode] = Field(default_factory=list)
    """Tools that the server runs for the agent: calculator, search. Repeat or separate by commas."""
    search_corpus: Path | None = None
    """JSONL file of {"title", "text"} objects for the search tool."""
    max_steps: int = Field(16, ge=1, le=1000)
    """Most steps of one run of server-run tools."""
    max_run_tokens: int = Field(8192, ge=1)
    """Most tokens that the policy may write in one run."""
    deadline: float = Field(300.0, gt=0, allow_inf_nan=False)
    """Most seconds of one run."""
    tool_timeout: float = Field(30.0, gt=0, allow_inf_nan=False)
    """Most seconds of one tool call."""
    max_context: int | None = Field(None, ge=16)
    """Most tokens of prompt and answer together; default: what the model allows."""
    max_batch_size: int = Field(32, ge=1, le=1024)
    """Completions in the batch at a time; more wait."""
    threads: int | None = Field(None, ge=1)
    """Threads of the engine's arithmetic on a CPU; default: the engine's own choice."""
    learn_every: int = Field(200, ge=0)
    """Start a learning cycle by itself after so many new episodes; 0: only when asked."""
    learner_arg: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Passed on to python -m learner, by the names of its command line: objectives=sft,implicit. Repeat for more."""
    demonstrations: Annotated[list[Path], NoDecode] = Field(default_factory=list)
    """Files of expert demonstrations to import once the server is up. Repeat or separate by commas."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """How much the server prints while it serves."""

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

    @field_validator("tools", "demonstrations", mode="before")
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

    @model_validator(mode="after")
    def _guard_public_bind(self) -> Settings:
        if self.api_key is None and not _is_loopback(self.host):
            raise ValueError(f"host {self.host} can be reached by others: set an API key (--api-key), or use 127.0.0.1")
        return self


def _config_file() -> Path:
    """Raises FileNotFoundError for a file that is named but is not there."""
    named = os.environ.get("STEPAGENT_CONFIG")
    if named and not Path(named).is_file():
        raise FileNotFoundError(f"STEPAGENT_CONFIG names {named}, which is not a file")
    return Path(named or "stepagent.toml")


def _is_loopback(host: str) -> bool:
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
    return parse(Settings, arguments, "python serve.py", os.environ.get("STEPAGENT_CONFIG", "stepagent.toml"))
