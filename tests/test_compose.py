"""docker-compose.yml and its images, as far as they can be judged without Docker."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose.file import (
    DOCKERFILE,
    EXAMPLE,
    FILE,
    ROOT,
    UnfilledError,
    env_file,
    interpolate,
    mounts,
    read,
    seconds,
    variables_of,
)
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sweeper import settings
from sweeper.study.spec import Faults

SECRETS = {
    "POSTGRES_PASSWORD",
    "SWEEPER_DB_PASSWORD",
    "MLFLOW_DB_PASSWORD",
    "MLFLOW_PASSWORD",
    "MLFLOW_SECRET_KEY",
}
FILLED = {name: f"the {name} of a test" for name in SECRETS}
RAW: dict[str, Any] = yaml.safe_load(FILE.read_text("utf-8"))
COMPOSE = read(FILLED)
SERVICES: dict[str, Any] = COMPOSE["services"]
RECIPE = DOCKERFILE.read_text("utf-8")
BESIDE_PYTHON = str(Path(sys.executable).parent)
HADOLINT = shutil.which("hadolint", path=BESIDE_PYTHON) or shutil.which("hadolint")
"""The wheel's program stands beside this Python, which need not be on the PATH."""


def stages() -> dict[str, str]:
    """The text of every stage of the Dockerfile by name."""
    parts = re.split(r"^FROM (\S+) AS (\S+)\n", RECIPE, flags=re.MULTILINE)
    return {
        name: f"FROM {base}\n{text}"
        for base, name, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
    }


def test_the_file_follows_the_compose_specification() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "check_jsonschema"),
            *("--builtin-schema", "vendor.compose-spec", str(FILE)),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_refers_to_is_there(name: str) -> None:
    service = SERVICES[name]
    for other, demand in service.get("depends_on", {}).items():
        assert other in SERVICES
        assert demand["condition"] == "service_healthy"
        assert "healthcheck" in SERVICES[other]
        assert "profiles" not in SERVICES[other]
    assert set(service["networks"]) <= set(COMPOSE["networks"])
    assert set(service.get("secrets", [])) <= set(COMPOSE.get("secrets", {}))
    for source in mounts(service).values():
        if source.startswith("."):
            assert (ROOT / source).is_file()
        else:
            assert source in COMPOSE["volumes"]
    if build := service.get("build"):
        assert (ROOT / build["context"] / build["dockerfile"]).samefile(DOCKERFILE)
        assert build["target"] in stages()
        for argument in build.get("args", {}):
            assert f"ARG {argument}" in RECIPE
    else:
        assert re.fullmatch(r"[a-z]+:\d+[\w.-]*", service["image"])


def test_every_volume_and_network_is_used() -> None:
    used = {source for service in SERVICES.values() for source in mounts(service).values()}
    assert set(COMPOSE["volumes"]) <= used
    assert set(COMPOSE["networks"]) == {
        network for service in SERVICES.values() for network in service["networks"]
    }


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_starts_again_ends_in_good_order_and_has_no_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    assert service["init"] is True
    assert seconds(service["stop_grace_period"]) >= 30
    assert service["healthcheck"]["test"][0] == "CMD"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert service["deploy"]["resources"]["reservations"]["memory"]
    assert isinstance(service["command"], list)


@pytest.mark.parametrize("name", ["controller", "worker-cpu", "worker-gpu"])
def test_a_worker_has_longer_than_its_trials_need_to_go_back(name: str) -> None:
    assert seconds(SERVICES[name]["stop_grace_period"]) > Faults().grace_s
    if name != "controller":  # the epoch, then the checkpoint and what is left for MLflow
        assert seconds(SERVICES[name]["stop_grace_period"]) >= 2 * Faults().grace_s


def test_nobody_but_this_machine_can_connect() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_profiles_differ_in_their_workers_only() -> None:
    profiles = {name: service.get("profiles") for name, service in SERVICES.items()}
    assert profiles == {
        "postgres": None,
        "mlflow": None,
        "controller": None,
        "worker-cpu": ["cpu"],
        "worker-gpu": ["gpu"],
    }
    (devices,) = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


@pytest.mark.parametrize("secret", sorted(SECRETS))
def test_a_secret_must_be_filled(secret: str) -> None:
    for value in (None, ""):
        lacking = {**FILLED, secret: value} if value == "" else dict(FILLED)
        if value is None:
            del lacking[secret]
        with pytest.raises(UnfilledError, match=f"{secret} must be filled in .env"):
            read(lacking)  # type: ignore[arg-type]  # None was removed


def test_the_example_names_every_variable_and_fills_no_secret() -> None:
    example = EXAMPLE.read_text("utf-8")
    unfilled = env_file(example)
    assert {name for name, value in unfilled.items() if not value} == unfilled.keys()
    assert unfilled.keys() == SECRETS | {"TORCH_CPU_INDEX"}
    optional = set(re.findall(r"^# ([A-Z_]+)=", example, re.MULTILINE))
    assert unfilled.keys() | optional == variables_of(FILE.read_text("utf-8"))


def test_what_is_secret_comes_from_a_variable_and_only_into_the_environment() -> None:
    secretive = re.compile("PASSWORD|SECRET")
    for service in RAW["services"].values():
        for name, value in service.get("environment", {}).items():
            if secretive.search(name):
                assert re.fullmatch(r"\$\{[A-Z_]+:\?must be filled in \.env\}", value), name
    for service in SERVICES.values():
        rest = str({**service, "environment": {}})
        assert not any(secret in rest for secret in FILLED.values())
        for name, value in service["environment"].items():
            if not secretive.search(name):
                assert value not in FILLED.values()


def test_each_service_knows_only_its_own_secrets() -> None:
    def known(name: str) -> set[str]:
        values = SERVICES[name]["environment"].values()
        return {secret for secret, value in FILLED.items() if value in values}

    assert known("postgres") == {"POSTGRES_PASSWORD", "SWEEPER_DB_PASSWORD", "MLFLOW_DB_PASSWORD"}
    assert known("mlflow") == {"MLFLOW_DB_PASSWORD", "MLFLOW_PASSWORD", "MLFLOW_SECRET_KEY"}
    for name in ("controller", "worker-cpu", "worker-gpu"):
        assert known(name) == {"SWEEPER_DB_PASSWORD", "MLFLOW_PASSWORD"}


def test_the_variables_are_ones_that_somebody_reads() -> None:
    from mlflow import environment_variables
    from mlflow.cli import server
    from psycopg.pq import Conninfo

    known = set(re.findall(r"SWEEPER_[A-Z_]+", Path(settings.__file__).read_text("utf-8")))
    known |= {name for name in dir(environment_variables) if name.startswith("MLFLOW_")}
    known |= {str(option.envvar) for option in server.params if option.envvar}
    known |= {(option.envvar or b"").decode() for option in Conninfo.get_defaults()}
    script = (ROOT / "deploy/postgres/databases.sh").read_text("utf-8")
    known |= set(re.findall(r"(?:getenv \w+ |\$\{)(\w+)", script))
    known |= {"POSTGRES_PASSWORD", "POSTGRES_INITDB_ARGS"}  # the postgres image's
    given = {name for service in SERVICES.values() for name in service["environment"]}
    assert given <= known


def test_interpolation_is_that_of_compose() -> None:
    text = "$$ ${A} ${B:-two} ${C:-} ${A:-not this}"
    assert interpolate({"x": [text]}, {"A": "one", "B": ""}) == {"x": ["$ one two  one"]}


# The images


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_the_dockerfile_is_without_fault() -> None:
    done = subprocess.run(
        [str(HADOLINT), str(DOCKERFILE)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_dockerfile_copies_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").split()
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", RECIPE, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert "*" in ignored
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(Path(source).is_relative_to(root) for root in allowed), source
    for stage in re.findall(r"--from=(\S+)", RECIPE):
        assert stage in stages()


@pytest.mark.parametrize("target", ["mlflow", "cpu", "gpu"])
def test_an_image_is_small_and_nobody_in_it_is_root(target: str) -> None:
    own = stages()
    text = own[target]
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["10001:10001"]
    assert "COPY --from=" in text
    assert "pip" not in text  # nothing is built in it
    base = re.match(r"FROM (\S+)", text)
    assert base is not None
    assert base[1] in {"base", "sweeper"}


def test_every_installed_version_is_a_constraint() -> None:
    installs = re.findall(r"pip (?:install|wheel) (.+?)(?: \\)?$", RECIPE, re.MULTILINE)
    assert len(installs) == 7
    for words in installs:
        assert words.startswith(("-c constraints.txt ", "--no-deps "))
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines if "==" in line}
    wanted = ["sweeper[postgres,grpc,timm]", "mlflow[auth]", "psycopg[binary]", "setuptools"]
    assert needed(wanted) - pinned == {"sweeper"}


def needed(requirements: list[str]) -> set[str]:
    """What pip installs for these, by the distributions that are installed here.

    What torch itself pins (CUDA's libraries) is left out, and what is not installed here.
    """
    found: set[tuple[str, frozenset[str]]] = set()
    open_ = [Requirement(text) for text in requirements]
    while open_:
        wanted = open_.pop()
        key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key in found:
            continue
        try:
            asked = metadata.distribution(wanted.name).requires or []
        except metadata.PackageNotFoundError:
            continue
        found.add(key)
        for requirement in map(Requirement, asked):
            marker = requirement.marker
            extras = [*wanted.extras, ""]
            if marker and not any(marker.evaluate({"extra": extra}) for extra in extras):
                continue
            if key[0] == "torch" and "==" in str(requirement.specifier):
                continue
            open_.append(requirement)
    return {name for name, _ in found}


@pytest.mark.parametrize(
    "file", [FILE, EXAMPLE, DOCKERFILE, ROOT / "deploy/kubernetes.yaml", ROOT / "docs/cluster.md"]
)
def test_no_package_index_is_named(file: Path) -> None:
    text = file.read_text("utf-8").lower()
    assert not re.search(r"pypi|pythonhosted|download\.pytorch|whl/cpu|anaconda", text)
