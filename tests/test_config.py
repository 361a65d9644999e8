"""The server's options: three sources in order, wrong values told in a sentence, and help without heavy imports."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.config import Settings, parse_settings
from runtime.store.episodes import Role
from runtime.store.keys import KeyStore
from serve import main, spelled

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def away_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No options of the machine's own: an empty folder, and no variables."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("STEPAGENT_")]:
        monkeypatch.delenv(name)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said of options that cannot be used."""
    with pytest.raises(SystemExit) as ended:
        parse_settings(list(arguments))
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    return said.err


def test_without_options_everything_has_a_default() -> None:
    settings = parse_settings([])
    assert (settings.host, settings.port, settings.engine) == ("127.0.0.1", 8000, "embedded")
    assert settings.model == "policies/novice_model"
    assert settings.world_name == "order_desk"
    assert settings.api_key is None


def test_options_come_from_the_command_line() -> None:
    settings = parse_settings(
        ["--port", "9", "--state", "s", "--tool-timeout=1.5", "--tools", "calculator,search", "--max-context", "512"]
    )
    assert (settings.port, settings.state, settings.tool_timeout) == (9, Path("s"), 1.5)
    assert (settings.tools, settings.max_context) == (["calculator", "search"], 512)


def test_memory_is_given_in_bytes_or_with_a_unit() -> None:
    assert parse_settings(["--kv-memory", "2GiB"]).kv_memory == 2 << 30
    assert parse_settings(["--kv-memory", "1000000"]).kv_memory == 1_000_000


def test_lists_are_repeated_or_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["calculator", "search"]
    assert parse_settings(["--tools", "calculator", "--tools", "search"]).tools == wanted
    assert parse_settings(["--tools", "calculator, search,"]).tools == wanted
    monkeypatch.setenv("STEPAGENT_TOOLS", "calculator,search")
    assert parse_settings([]).tools == wanted


def test_more_draws_than_requests_may_ask_for_by_default_are_no_contradiction() -> None:
    assert parse_settings(["--best-of", "16"]).best_of == 16
    assert parse_settings(["--best-of", "4", "--best-of-most", "4"]).best_of_most == 4


def test_options_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPAGENT_PORT", "9")
    monkeypatch.setenv("STEPAGENT_TOOL_TIMEOUT", "1.5")
    monkeypatch.setenv("STEPAGENT_API_KEY", "s3cret")
    settings = parse_settings([])
    assert (settings.port, settings.tool_timeout) == (9, 1.5)
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "s3cret"


def test_every_option_can_come_from_every_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One value for each option that differs from its default, from each of the three sources."""
    values = {
        "host": "localhost", "port": "1", "state": "s", "engine": "vllm", "model": "m", "served_name": "n",
        "cors_origins": "http://a.example", "shutdown_grace": "9.5", "max_waiting": "9", "promote": "ask",
        "learn": "dry-run", "canary_share": "0.5", "approval_days": "3.0", "world": "w", "tools": "t",
        "search_corpus": "c", "max_steps": "2", "max_run_tokens": "3", "deadline": "4.5", "tool_timeout": "5.5",
        "max_context": "16", "max_batch_size": "6", "threads": "7", "log_level": "info", "response_template": "r",
        "learn_every": "8", "demonstrations": "demos.jsonl", "kv_memory": "2GiB", "precision": "bfloat16",
        "run_tools": "asked", "agents": "agents.toml", "max_adapters": "9",
        "best_of": "2", "best_of_most": "9", "best_of_by": "majority",
        "keep_days": "30.5", "keep_gb": "0.5", "redact_secrets": "off", "redact": "a.b:c",
    }  # fmt: skip
    (tmp_path / "demos.jsonl").touch()
    missing = set(Settings.model_fields) - set(values) - {"engine_arg", "learner_arg", "api_key", "api_key_file"}
    assert not missing, f"give this test a value for {missing}"
    by_command_line = parse_settings([f"--{name.replace('_', '-')}={value}" for name, value in values.items()])
    toml = tmp_path / "stepagent.toml"
    toml.write_text("".join(f'{name} = "{value}"\n' for name, value in values.items()))
    by_file = parse_settings([])
    toml.unlink()
    for name, value in values.items():
        monkeypatch.setenv(f"STEPAGENT_{name.upper()}", value)
    by_environment = parse_settings([])
    assert by_command_line == by_file == by_environment
    assert all(getattr(by_file, name) != getattr(Settings.model_construct(), name, None) for name in values)


def test_options_come_from_a_toml_file_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.toml").write_text('port = 9\ntools = ["calculator"]\n')
    monkeypatch.setenv("STEPAGENT_CONFIG", "other.toml")
    settings = parse_settings([])
    assert (settings.port, settings.tools) == (9, ["calculator"])


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stepagent.toml").write_text("port = 1\nmax_steps = 1\nmax_batch_size = 1\n")
    monkeypatch.setenv("STEPAGENT_PORT", "2")
    monkeypatch.setenv("STEPAGENT_MAX_STEPS", "2")
    settings = parse_settings(["--port", "3"])
    assert (settings.port, settings.max_steps, settings.max_batch_size) == (3, 2, 1)


# -------------------------------------------------------------------------------------------- wrong values


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("foo=1", "learner_arg foo: no such option; python -m learner once --help lists them"),
        ("epochs=abc", "epochs: Input should be a valid integer"),
        ("rank=0", "rank: Input should be greater than or equal to 1"),
        ("objectives=telepathy", "objectives: no objective is called 'telepathy'"),
        ("expert-url=http://127.0.0.1:9/v1", "--expert-url and --expert-model go together"),
        ("state=elsewhere", "learner_arg state: the server itself tells the learner"),
        ("server-pid=1", "learner_arg server-pid: the server itself tells the learner"),
    ],
)
def test_what_the_learner_would_not_take_is_refused_before_anything_is_served(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: str, said: str
) -> None:
    """The server started, and every cycle then died with exit code 2."""
    monkeypatch.setattr("serve.run", lambda settings: pytest.fail("it is served"))
    with pytest.raises(SystemExit) as ended:
        main(["--learner-arg", given])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert "loading" not in printed.out


def test_what_the_learner_takes_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Settings] = []
    monkeypatch.setattr("serve.run", served.append)
    given = {"epochs": "3", "discriminator": "false", "no-implicit-rewards": "true", "objectives": "sft,rft"}
    main([part for name, value in given.items() for part in ("--learner-arg", f"{name}={value}")])
    assert served[0].learner_arg == given


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "seventy"], "port"),
        (["--port", "70000"], "port"),
        (["--port", "-1"], "port"),
        (["--engine", "steam"], "engine"),
        (["--max-steps", "0"], "max_steps"),
        (["--deadline", "0"], "deadline"),
        (["--deadline", "nan"], "deadline"),
        (["--tool-timeout", "inf"], "tool_timeout"),
        (["--log-level", "shout"], "log"),
        (["--kv-memory", "much"], "kv_memory"),
        (["--kv-memory", "0"], "kv_memory"),
        (["--precision", "float8"], "precision"),
        (["--best-of", "4", "--best-of-most", "3"], "best_of_most 3 is below best_of 4"),
        (["--no-such-option", "1"], "no-such-option"),
        (["stray"], "stray"),
        (["--port"], "port"),
    ],
)
def test_a_wrong_value_ends_with_a_sentence_that_names_it(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert said in complaint(capsys, *arguments)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("port = 70000", "port"),
        ("prot = 8000", "prot"),
        ("port = ", "stepagent.toml"),
        ("[server]\nport = 1", "server"),
        ("\udcff", "stepagent.toml"),
    ],
)
def test_a_wrong_file_ends_with_a_sentence_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, written: str, said: str
) -> None:
    (tmp_path / "stepagent.toml").write_bytes(written.encode(errors="surrogateescape"))
    assert said in complaint(capsys)


def test_a_file_that_was_named_must_be_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPAGENT_CONFIG", "missing.toml")
    assert "missing.toml" in complaint(capsys)


def test_a_secret_is_not_shown_where_options_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPAGENT_API_KEY", "s3cret")
    assert "s3cret" not in complaint(capsys, "--port", "-1")
    assert "s3cret" not in repr(parse_settings([]))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_a_public_address_without_a_key_is_refused(
    capsys: pytest.CaptureFixture[str], host: str, tmp_path: Path
) -> None:
    assert "--api-key-file" in complaint(capsys, "--host", host)
    (tmp_path / "key").write_text("s3cret\n")
    assert parse_settings(["--host", host, "--api-key-file", str(tmp_path / "key")]).host == host
    KeyStore(tmp_path / "agent.db").make("ann", Role.ADMIN)
    assert parse_settings(["--host", host, "--state", str(tmp_path)]).host == host


def test_an_empty_key_is_no_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STEPAGENT_API_KEY", "")
    assert "key" in complaint(capsys, "--host", "0.0.0.0")
    monkeypatch.delenv("STEPAGENT_API_KEY")
    (tmp_path / "key").write_text(" \n")
    assert "is empty" in complaint(capsys, "--api-key-file", str(tmp_path / "key"))


@pytest.mark.parametrize("option", ["--api-key", "--api-key=s3cret", "--api_key", "--api-k=s3cret"])
def test_a_key_on_the_command_line_is_refused_since_everybody_can_read_it_there(
    capsys: pytest.CaptureFixture[str], option: str
) -> None:
    said = complaint(capsys, option, "s3cret")
    assert "--api-key-file" in said
    assert "STEPAGENT_API_KEY" in said
    assert "s3cret" not in said
    assert "one of its own" in complaint(capsys, "--learner-arg", "api-key=s3cret")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_a_private_address_needs_no_key(host: str) -> None:
    assert parse_settings(["--host", host]).host == host


# --------------------------------------------------------------------------------------------------- help


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


def cpu_s_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_answers_at_once_and_explains_every_option() -> None:
    run_python("serve.py", "--help")  # the first one may compile
    began = cpu_s_of_children()
    told = run_python("serve.py", "--help")
    assert cpu_s_of_children() - began < 1.5
    assert told.returncode == 0
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in told.stdout
        assert field.description, f"{name} needs a docstring"
        assert field.description.split()[0] in told.stdout


def test_options_are_parsed_without_heavy_imports() -> None:
    program = (
        "import sys, serve\n"
        "serve.parse_settings(['--port', '0'])\n"
        "heavy = {'torch', 'transformers', 'peft', 'fastapi', 'uvicorn', 'openai', 'langchain_core', 'sqlite_utils'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run_python("-c", program).stdout.strip() == "[]"


def test_engine_arguments_come_one_by_one_or_as_a_table(tmp_path: Path) -> None:
    given = parse_settings(["--engine-arg", "tensor_parallel_size=2", "--engine-arg", "gpu_memory_utilization=0.5"])
    (tmp_path / "stepagent.toml").write_text("[engine_arg]\ntensor_parallel_size = 2\ngpu_memory_utilization = 0.5\n")
    table = parse_settings([])
    for settings in (given, table):
        assert {name: str(value) for name, value in settings.engine_arg.items()} == {
            "tensor_parallel_size": "2",
            "gpu_memory_utilization": "0.5",
        }


def test_a_value_passed_on_may_hold_commas_and_equal_signs() -> None:
    """The example in the option's own help, objectives=sft,implicit, could not be parsed."""
    given = ["--learner-arg", "objectives=sft,implicit", "--learner-arg=epochs=3"]
    assert parse_settings(given).learner_arg == {"objectives": "sft,implicit", "epochs": "3"}
    given = ["--learner-arg", 'expert-url=http://127.0.0.1/?a=b,c="d"', "--engine-arg", "a=b,c=d"]
    assert parse_settings(given).learner_arg == {"expert-url": 'http://127.0.0.1/?a=b,c="d"'}
    assert parse_settings(given).engine_arg == {"a": "b,c=d"}
    assert parse_settings(["--learner-arg", '{"epochs": 3}']).learner_arg == {"epochs": 3}


def test_engine_arguments_in_a_table_may_be_lists_and_tables(tmp_path: Path) -> None:
    (tmp_path / "stepagent.toml").write_text(
        '[engine_arg]\nlora_target_modules = ["o_proj", "down_proj"]\n[engine_arg.compilation_config]\nlevel = 0\n'
    )
    assert {name: spelled(value) for name, value in parse_settings([]).engine_arg.items()} == {
        "lora_target_modules": "o_proj down_proj",
        "compilation_config": '{"level": 0}',
    }


def test_demonstration_files_are_named_one_by_one_or_by_commas_and_must_be_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for file in files:
        file.touch()
    first, second, third = map(str, files)
    assert parse_settings(["--demonstrations", f"{first},{second}", "--demonstrations", third]).demonstrations == files
    with pytest.raises(SystemExit):
        parse_settings(["--demonstrations", str(tmp_path / "nowhere.jsonl")])
    assert "nowhere.jsonl is not a file" in capsys.readouterr().err


def test_only_the_novice_has_a_world_by_default() -> None:
    assert parse_settings(["--model", "some/model"]).world_name == ""
    assert parse_settings(["--model", "some/model", "--world", "order_desk"]).world_name == "order_desk"
    assert parse_settings(["--world", ""]).world_name == ""
