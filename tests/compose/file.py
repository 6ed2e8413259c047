"""docker-compose.yml as Compose reads it, and what its services are on one machine without Docker.

Of a container only three things are translated: names of services become 127.0.0.1, ports become
free ones, and the paths of volumes and of what an image copied become folders of the test.
"""

from __future__ import annotations

import random
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
FILE: Final = ROOT / "docker-compose.yml"
EXAMPLE: Final = ROOT / ".env.example"
DOCKERFILE: Final = ROOT / "deploy/Dockerfile"

_VARIABLE: Final = re.compile(
    r"\$(?:(?P<dollar>\$)|\{(?P<name>\w+)(?:(?P<kind>:[-?])(?P<rest>[^}]*))?\})"
)


class UnfilledError(Exception):
    """A variable that must be filled is not."""


def interpolate(value: Any, variables: Mapping[str, str]) -> Any:
    """``value`` with every ``${NAME}``, ``${NAME:-default}`` and ``${NAME:?message}`` filled in."""
    if isinstance(value, dict):
        return {key: interpolate(inner, variables) for key, inner in value.items()}
    if isinstance(value, list):
        return [interpolate(inner, variables) for inner in value]
    if not isinstance(value, str):
        return value

    def filled(found: re.Match[str]) -> str:
        if found["dollar"]:
            return "$"
        known = variables.get(found["name"], "")
        if not known and found["kind"] == ":?":
            raise UnfilledError(f"{found['name']} {found['rest']}")
        return known or (found["rest"] if found["kind"] == ":-" else "")

    return _VARIABLE.sub(filled, value)


def variables_of(text: str) -> set[str]:
    """The names of the variables that a Compose file asks for."""
    return {found["name"] for found in _VARIABLE.finditer(text) if found["name"]}


def read(variables: Mapping[str, str]) -> dict[str, Any]:
    """The whole file with the variables of an ``.env``. Raises UnfilledError where one lacks."""
    loaded: dict[str, Any] = interpolate(yaml.safe_load(FILE.read_text("utf-8")), variables)
    return loaded


def env_file(text: str) -> dict[str, str]:
    """What an ``.env`` file sets."""
    lines = (line.strip() for line in text.splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


def seconds(duration: str) -> int:
    """A Compose duration such as ``90s`` or ``2m``."""
    parts = re.findall(r"(\d+)([smh])", duration)
    return sum(int(count) * {"s": 1, "m": 60, "h": 3600}[unit] for count, unit in parts)


def mounts(service: Mapping[str, Any]) -> dict[str, str]:
    """Target to source of a service's volumes, in the short form."""
    found = {}
    for text in service.get("volumes", []):
        source, target = text.split(":")[:2]
        found[target] = source
    return found


def copied() -> dict[str, str]:
    """Path in an image to file here, of what the Dockerfile copies from here to fixed places."""
    text = DOCKERFILE.read_text("utf-8")
    return {
        target: str(ROOT / source)
        for source, target in re.findall(r"^COPY (deploy/\S+) (/\S+)$", text, re.MULTILINE)
    }


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on, below those of outgoing connections."""
    sockets: list[socket.socket] = []
    for port in random.sample(range(12_000, 20_000), 200):
        each = socket.socket()
        try:
            each.bind(("127.0.0.1", port))
        except OSError:
            each.close()
            continue
        sockets.append(each)
        if len(sockets) == count:
            break
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Machine:
    """One folder in which the services' containers have their places, and their ports."""

    def __init__(self, folder: Path, variables: Mapping[str, str]) -> None:
        self.folder = folder
        self.services: dict[str, Any] = read(variables)["services"]
        inside = sorted({_inside(port) for port in self._published()})
        self.ports = dict(zip(inside, free_ports(len(inside)), strict=True))
        self.places = copied()
        for service in self.services.values():
            for target, source in mounts(service).items():
                if not source.startswith((".", "/")):
                    self.places[target] = str(folder / "volumes" / source)
        for place in self.places.values():
            if place.startswith(str(folder)):
                Path(place).mkdir(parents=True, exist_ok=True)

    def _published(self) -> list[str]:
        return [port for service in self.services.values() for port in service.get("ports", [])]

    def here(self, text: str) -> str:
        """``text`` of a container, as it has to read on this machine."""
        for target in sorted(self.places, key=len, reverse=True):
            text = text.replace(target, self.places[target])
        for service in self.services:
            text = re.sub(rf"(^|[@/,]){service}(?=:\d)", r"\g<1>127.0.0.1", text)
        text = text.replace("0.0.0.0", "127.0.0.1")
        for inside, outside in self.ports.items():
            text = re.sub(rf"(?<!\d){inside}(?!\d)", str(outside), text)
        return text

    def environment(self, name: str) -> dict[str, str]:
        """The variables that the file gives a service."""
        given = self.services[name].get("environment", {})
        return {
            key: "127.0.0.1" if key == "PGHOST" else self.here(str(value))
            for key, value in given.items()
        }

    def command(self, name: str) -> list[str]:
        """A service's command line; its first word is a program and no place."""
        program, *words = (str(word) for word in self.services[name]["command"])
        return [program, *map(self.here, words)]

    def health_command(self, name: str) -> list[str]:
        """The command of a service's health check."""
        kind, program, *words = self.services[name]["healthcheck"]["test"]
        if kind != "CMD":
            raise ValueError(f"a health check must be a command line, but {name}'s is {kind}")
        return [program, *map(self.here, words)]


def _inside(port: str) -> int:
    return int(port.rsplit(":", 1)[1])
