"""The deployment files name what exists, and what the container's image would hold is enough to serve and to back up.

There is no container engine in the tests: the files that the image gets are copied to a folder of their own instead.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from runtime.backup import parse as parse_backup
from runtime.config import Settings, parse_settings
from tests.test_serve import ENVIRONMENT, Process

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "examples" / "deploy"
CONTAINERFILE = DEPLOY / "Containerfile"
KNOWN = {"ARG", "FROM", "WORKDIR", "ENV", "COPY", "RUN", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest of its line) of the Containerfile."""
    lines = [line for line in CONTAINERFILE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines()]


def of_kind(kind: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == kind]


def image_environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in of_kind("ENV") for pair in shlex.split(rest))


def copies() -> Iterator[tuple[str, str]]:
    """(what is copied, where it comes to lie in the image's working directory)."""
    for rest in of_kind("COPY"):
        *sources, target = rest.split()
        for source in sources:
            lies_in = target.rstrip("/")
            if not source.endswith("/"):
                lies_in = f"{lies_in}/{Path(source).name}"
            yield source.rstrip("/"), lies_in.removeprefix("./")


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A folder with the files that the image would hold in its working directory."""
    for source, target in copies():
        if (ROOT / source).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / source, tmp_path / "app" / target, dirs_exist_ok=True, ignore=ignored)
        else:
            (tmp_path / "app" / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / source, tmp_path / "app" / target)
    return tmp_path / "app"


@contextmanager
def running(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[Process]:
    process = subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield Process(process)
    finally:
        process.kill()
        process.wait()


# ---------------------------------------------------------------------------------------- the container file


def test_what_is_copied_exists_and_is_seen_by_the_build() -> None:
    assert {kind for kind, _ in instructions()} <= KNOWN
    seen = (DEPLOY / "Containerfile.dockerignore").read_text().splitlines()
    for source, _ in copies():
        assert (ROOT / source).exists(), source
        assert f"!{source.split('/')[0]}" in seen, f"{source} is hidden from the build"


def test_what_is_installed_is_asked_for_in_words_that_pip_and_the_project_know() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (install,) = [rest for rest in of_kind("RUN") if "pip install" in rest]
    assert '-c "${CONSTRAINTS}" ".${EXTRAS}"' in install
    assert "CONSTRAINTS=constraints.txt" in of_kind("ARG")
    least, below = re.findall(r"3\.(\d+)", project["requires-python"])
    (python,) = [int(rest.split(".")[1]) for rest in of_kind("ARG") if rest.startswith("PYTHON=")]
    assert int(least) <= python < int(below)
    assert set(re.findall(r"EXTRAS=\[(\w+)\]", CONTAINERFILE.read_text())) <= set(project["optional-dependencies"])


def test_its_environment_is_of_options_that_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in image_environment().items():
        monkeypatch.setenv(name, value)
        if name.startswith("STEPAGENT_"):
            assert name.removeprefix("STEPAGENT_").lower() in Settings.model_fields
    monkeypatch.setenv("STEPAGENT_API_KEY", "s3cret")
    entry = json.loads(of_kind("ENTRYPOINT")[0])
    assert entry == ["python", "serve.py"]
    settings = parse_settings([])
    assert (settings.host, str(settings.state), settings.port) == ("0.0.0.0", "/state", 8000)
    assert of_kind("VOLUME") == ["/state"]
    assert of_kind("EXPOSE") == ["8000"]


def test_the_image_serves_is_healthy_learns_and_backs_up(image: Path, tmp_path: Path) -> None:
    """Its own files, its own entry, its own health check; only the port and the folder are others."""
    environment = {**ENVIRONMENT, **image_environment(), "STEPAGENT_HOST": "127.0.0.1", "STEPAGENT_PORT": "0"}
    environment |= {"STEPAGENT_STATE": str(tmp_path / "state"), "STEPAGENT_API_KEY": "s3cret", "HOME": str(tmp_path)}
    _, *entry = json.loads(of_kind("ENTRYPOINT")[0])
    _, *check = json.loads(of_kind("HEALTHCHECK")[0].split("CMD ")[1])
    with running([sys.executable, *entry], image, environment) as server:
        port = server.wait_for(r"listening +http://127\.0\.0\.1:(\d+)")
        server.wait_for(r"(try) ")
        for code, at in ((0, port), (1, "9")):
            healthy = [part.replace("8000", at) for part in check]
            assert subprocess.run([sys.executable, *healthy], stderr=subprocess.DEVNULL).returncode == code
        asked = {"model": "novice_model", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        headers = {"authorization": "Bearer s3cret"}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=asked, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        command = [sys.executable, "-m", "runtime.backup", "make", str(tmp_path / "b.tar")]
        done = subprocess.run([*command, "--state", str(tmp_path / "state")], cwd=image, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "learner", "verify", "--state", str(tmp_path / "state")],
        cwd=image, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------- compose


def test_compose_names_what_there_is() -> None:
    services = compose()["services"]
    build = services["server"]["build"]
    context = (DEPLOY / build["context"]).resolve()
    assert context == ROOT
    assert (context / build["dockerfile"]) == CONTAINERFILE
    declared = {argument.split("=")[0] for argument in of_kind("ARG")}
    assert set(build["args"]) <= declared
    for service in services.values():
        for volume in service.get("volumes", ()):
            source, target, *_ = volume.split(":")
            if source.startswith("./"):
                assert source in ("./backups",) or (DEPLOY / source).exists(), source
            else:
                assert source in compose()["volumes"]
            assert target.startswith("/")
        assert set(service.get("secrets", ())) <= set(compose()["secrets"])
        assert set(service.get("depends_on", ())) <= set(services)
    assert "state:/state" in services["server"]["volumes"]


def test_its_server_starts_with_options_that_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = compose()["services"]["server"]
    for name, value in {**image_environment(), **server["environment"]}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "admin_key").write_text("s3cret\n")
    assert server["environment"]["STEPAGENT_API_KEY_FILE"] == "/run/secrets/admin_key"
    monkeypatch.setenv("STEPAGENT_API_KEY_FILE", str(tmp_path / "admin_key"))
    settings = parse_settings(server["command"])
    assert settings.api_key_file is not None
    assert server["stop_grace_period"] == "40s"
    assert settings.shutdown_grace < 30
    test = server["healthcheck"]["test"]
    assert test[0] == "CMD"
    assert test[1:] == json.loads(of_kind("HEALTHCHECK")[0].split("CMD ")[1])


def test_its_backup_is_a_command_that_there_is(tmp_path: Path) -> None:
    """Run as the container would, by the same shell, with another folder."""
    shell, flag, script = compose()["services"]["backup"]["entrypoint"]
    script = script.replace("$$", "$").replace("/backups/", f"{tmp_path}/").replace("exec python", "echo")
    said = subprocess.run([shell, flag, script], text=True, capture_output=True, check=True).stdout.split()
    assert said[:2] == ["-m", "runtime.backup"]
    options = parse_backup(said[2:])
    assert re.fullmatch(r"stepagent-\d{8}T\d{6}Z\.tar", options.file.name)


# ------------------------------------------------------------------------------------------------- systemd


def exec_start(unit: str) -> list[str]:
    line = next(each for each in (DEPLOY / unit).read_text().splitlines() if each.startswith("ExecStart="))
    return shlex.split(line.removeprefix("ExecStart="))


def test_the_unit_starts_with_options_that_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "admin_key").write_text("s3cret\n")
    monkeypatch.setenv("STEPAGENT_API_KEY_FILE", str(tmp_path / "admin_key"))
    python, script, *options = exec_start("stepagent.service")
    assert (python, script) == ("/opt/stepagent/.venv/bin/python", "serve.py")
    assert str(parse_settings(options).state) == "/var/lib/stepagent"


def test_the_nightly_backup_is_a_command_that_there_is() -> None:
    shell, flag, script = exec_start("stepagent-backup.service")
    script = script.replace("%%", "%").replace("exec /opt/stepagent/.venv/bin/python", "echo")
    said = subprocess.run([shell, flag, script], text=True, capture_output=True, check=True).stdout.split()
    options = parse_backup(said[2:])
    assert str(options.state) == "/var/lib/stepagent"
    assert re.fullmatch(r"/var/lib/stepagent-backups/\d{8}T\d{6}Z\.tar", str(options.file))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed here")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    for unit in DEPLOY.glob("stepagent*"):
        text = unit.read_text().replace("/opt/stepagent/.venv/bin/python", sys.executable)
        text = text.replace("User=stepagent", "User=root").replace("/opt/stepagent/docs", str(ROOT / "docs"))
        (tmp_path / unit.name).write_text(text.replace("WorkingDirectory=/opt/stepagent", f"WorkingDirectory={ROOT}"))
    units = sorted(str(path) for path in tmp_path.iterdir())
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], text=True, capture_output=True,
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
    )  # fmt: skip
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "stepagent" in line]
    assert not ours, "\n".join(ours)
    assert done.returncode == 0, done.stderr


def test_no_secret_and_no_state_is_copied_or_committed() -> None:
    assert "admin_key" not in {source for source, _ in copies()}
    assert "examples/deploy/admin_key" in (ROOT / ".gitignore").read_text()
    assert "examples/deploy/backups/" in (ROOT / ".gitignore").read_text()
