"""How the project's programs read their options: one class a program, each option documented once, under its field.

An option comes from the command line, or else from the environment. What is wrong is said in a sentence, with exit
code 2. Light to import: `--help` answers before anything heavy is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

KEY_OPTIONS = ("--api-key", "--api-ke", "--api-k")
"""The option, and what could be taken for short forms of it."""


class Options(BaseSettings):
    """The options of a program; its docstring is what `--help` says first."""

    model_config = SettingsConfigDict(
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        use_attribute_docstrings=True,
    )


T = TypeVar("T", bound=Options)


def parse(options: type[T], arguments: Sequence[str], program: str, source: str = "the environment") -> T:
    """The options as they are given. `source`: where those come from that are not on the command line."""
    refuse_keys(arguments)
    options.model_config["cli_prog_name"] = program
    try:
        return CliApp.run(options, cli_args=list(arguments))
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc'])) or 'options'}: {e['msg']}" for e in error.errors())
        refuse(problem.replace("Value error, ", "") for problem in problems)
    except SettingsError as error:
        refuse([str(error)])
    except (ValueError, OSError, RecursionError) as error:
        refuse([f"{source} cannot be read: {error}"])


def refuse_keys(arguments: Sequence[str]) -> None:
    """End the process where a key stands on its command line."""
    if any(argument.partition("=")[0].replace("_", "-") in KEY_OPTIONS for argument in arguments):
        refuse(["--api-key: every user of this machine can read a key on a command line (ps shows it): "
                "put it into STEPAGENT_API_KEY, or into a file: --api-key-file FILE"])  # fmt: skip


def refuse(problems: Iterable[str]) -> NoReturn:
    """Say what is wrong with the options, and end the process."""
    print("these options cannot be used:", *(f"  {problem}" for problem in problems), sep="\n", file=sys.stderr)
    raise SystemExit(2)


def split_commas(given: object) -> list[str]:
    """A list that may be repeated on the command line, or separated by commas."""
    parts = given if isinstance(given, list | tuple) else [given]
    return [part.strip() for each in parts for part in str(each).split(",") if part.strip()]
