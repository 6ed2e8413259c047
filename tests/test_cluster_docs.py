"""docs/cluster.md can be typed as it stands: commands and options exist, files are there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest
import yaml
from compose.file import EXAMPLE, FILE, ROOT, env_file, read
from typer.main import get_command

from sweeper.cli import app
from sweeper.study.parse import load
from sweeper.study.spec import Resources

PAGE: Final = ROOT / "docs/cluster.md"
PAGES: Final = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL: Final = re.compile(r"```(?:sh|bash)\n(.+?)```", re.DOTALL)
ENDS: Final = {"&&", "||", "|", ";", "<", ">", ">>", "&"}


def lines(page: Path) -> list[str]:
    """Every line of shell on a page, continued ones as one."""
    blocks = SHELL.findall(page.read_text("utf-8"))
    return [
        line
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]


def calls(line: str) -> list[list[str]]:
    """The command lines of sweeper within a line of shell, quoted ones included."""
    words = shlex.split(line, comments=True)
    found = []
    for index, word in enumerate(words):
        if " " in word:
            found += calls(word)
        elif word == "sweeper" or word.endswith("bin/sweeper"):
            rest = words[index + 1 :]
            stop = next((at for at, part in enumerate(rest) if part in ENDS), len(rest))
            if rest[:stop] and re.fullmatch("[a-z]+", rest[0]):
                found.append(rest[:stop])
    return found


COMMANDS: Final = get_command(app).commands  # type: ignore[attr-defined]  # a group has commands
CALLS: Final = [
    pytest.param(call, id=f"{page.name}: {' '.join(call)}")
    for page in PAGES
    for line in lines(page)
    for call in calls(line)
]


def test_calls_are_found() -> None:
    line = "FOO=1 sweeper launch --detach x.yaml && sh -c 'sweeper status a > out' | tee log"
    assert calls(line) == [["launch", "--detach", "x.yaml"], ["status", "a"]]
    assert calls("kubectl create namespace sweeper") == []
    assert calls("kubectl get --namespace sweeper pods/x") == []
    assert len(CALLS) > 10


@pytest.mark.parametrize("call", CALLS)
def test_a_command_can_be_typed(call: list[str]) -> None:
    command = COMMANDS[call[0]]
    command.make_context(call[0], list(call[1:]))  # raises on what it does not know
    overrides = [word for before, word in pairwise(call) if before == "--set"]
    for word in call[1:]:
        if word.startswith("studies/"):
            load(ROOT / word, overrides if all("=" in each for each in overrides) else [])


def test_the_piece_of_a_study_file_is_valid() -> None:
    (block,) = re.findall(r"```yaml\n(.+?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (resources,) = yaml.safe_load(block).values()
    assert Resources.model_validate(resources).slurm.limit_s == 4 * 3600


def test_a_wrong_option_is_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        COMMANDS["worker"].make_context("worker", ["--no-such-option"])


def test_the_shell_is_well_formed() -> None:
    for block in SHELL.findall(PAGE.read_text("utf-8")):
        done = subprocess.run(
            ["bash", "-n"], input=block, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_the_files_that_commands_name_are_there() -> None:
    named = {
        word
        for line in lines(PAGE)
        for word in shlex.split(line, comments=True)
        if re.fullmatch(r"(deploy|studies)/[\w./-]+", word)
    }
    assert {"deploy/Dockerfile", "deploy/kubernetes.yaml"} <= named
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_services_that_commands_name_are_there() -> None:
    services = yaml.safe_load(FILE.read_text("utf-8"))["services"]
    text = "\n".join(lines(PAGE))
    named = set(re.findall(r"docker compose (?:exec -T|exec|cp|logs --follow) ([a-z-]+)", text))
    assert "controller" in named
    assert named <= services.keys()
    profiles = set(re.findall(r"--profile (\w+)", text))
    assert profiles <= {name for each in services.values() for name in each.get("profiles", [])}


def test_the_command_that_fills_env_makes_a_complete_one(tmp_path: Path) -> None:
    found = re.search(r"<!-- fill -->\n```sh\n(.+?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert found is not None
    (tmp_path / ".env.example").write_bytes(EXAMPLE.read_bytes())
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", found[1]],
        cwd=tmp_path,
        env={**os.environ, "TORCH_CPU_INDEX": "an address"},
        check=True,
        timeout=30,
    )
    filled = tmp_path / ".env"
    values = env_file(filled.read_text("utf-8"))
    read(values)
    assert values["TORCH_CPU_INDEX"] == "an address"
    secrets = [value for name, value in values.items() if name != "TORCH_CPU_INDEX"]
    assert len(set(secrets)) == len(secrets) == 5
    assert all(re.fullmatch("[0-9a-f]{48}", value) for value in secrets)
    assert filled.stat().st_mode & 0o777 == 0o600


def test_the_readme_leads_here() -> None:
    assert "(docs/cluster.md)" in (ROOT / "README.md").read_text("utf-8")
