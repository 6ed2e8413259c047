"""Every service of docker-compose.yml as a process of this machine.

The command and the environment are the file's, the environment holds nothing else that matters,
and a service starts when those that it depends on are as healthy as the file demands.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import psutil
from compose.file import ROOT, Machine, mounts, seconds
from servers.postgres import account, wheel

POSTGRES: Final = wheel()
PROGRAMS: Final = os.pathsep.join(
    [str(Path(sys.executable).parent), str(POSTGRES), "/usr/local/bin:/usr/bin:/bin"]
)
START_S: Final = 150
"""So long a service may take until it is healthy on a busy machine."""


class Running:
    """The services that were started, each with its log."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.command_lines: set[str] = set()
        self._owner = account(POSTGRES)

    def log(self, name: str) -> Path:
        return self.machine.folder / f"{name}.log"

    def logs(self) -> str:
        """The end of every log, for the message of a failed test."""
        return "\n".join(
            f"== {file.name}\n{file.read_text(errors='replace')[-3000:]}"
            for file in sorted(self.machine.folder.glob("*.log"))
        )

    def environment(self, name: str) -> dict[str, str]:
        """What a container of the service would find, and what an image has from its base."""
        return {
            "PATH": PROGRAMS,
            "HOME": str(self.machine.folder / "home"),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            **self.machine.environment(name),
        }

    def start(self, name: str) -> None:
        """Start a service after those it depends on, each once it is healthy."""
        if name in self.processes:
            return
        service = self.machine.services[name]
        for other, demand in service.get("depends_on", {}).items():
            self.start(other)
            if demand["condition"] == "service_healthy":
                self.wait_until_healthy(other)
        command = self.machine.command(name)
        if name == "postgres":
            command = self._initialised(command)
        self.processes[name] = self._popen(name, command)

    def _popen(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        owner = self._owner if name == "postgres" else None
        self.command_lines.add(" ".join(command))
        with self.log(name).open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.machine.folder,
                env=self.environment(name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=owner,
                group=owner,
            )

    def _run(self, name: str, command: list[str], **more: str) -> None:
        owner = self._owner if name == "postgres" else None
        self.command_lines.add(" ".join(command))
        with self.log(name).open("ab") as log:
            subprocess.run(
                command,
                env={**self.environment(name), **more},
                cwd=self.machine.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=120,
                check=True,
                user=owner,
                group=owner,
            )

    def exec_in_postgres(self, command: list[str]) -> str:
        """What a command says inside that container, where the server's socket is in its place."""
        data = self.machine.places["/var/lib/postgresql/data"]
        done = subprocess.run(
            command,
            env={
                **self.environment("postgres"),
                "PGHOST": data,
                "PGPORT": str(self.machine.ports[5432]),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def _initialised(self, command: list[str]) -> list[str]:
        """What the entry point of the postgres image does with an empty volume: make a cluster,
        run the scripts of /docker-entrypoint-initdb.d on a server without a port, start it."""
        environment = self.machine.environment("postgres")
        targets = mounts(self.machine.services["postgres"])
        data = Path(self.machine.places["/var/lib/postgresql/data"])
        secret = self.machine.folder / "superuser"
        secret.write_text(environment["POSTGRES_PASSWORD"])
        for place in (data, secret):
            data.chmod(0o700)
            if self._owner is not None:
                os.chown(place, self._owner, self._owner)
        words = environment.get("POSTGRES_INITDB_ARGS", "").split()
        named = [f"--pgdata={data}", "--username=postgres", f"--pwfile={secret}"]
        self._run("postgres", ["initdb", *words, *named])
        secret.unlink()
        port = self.machine.ports[5432]
        with (data / "postgresql.conf").open("a") as settings:
            settings.write(f"unix_socket_directories = '{data}'\nport = {port}\n")
        own = [f"--pgdata={data}", "--wait", "-o", "-c listen_addresses=''"]
        self._run("postgres", ["pg_ctl", *own, "-l", str(data / "init.log"), "start"])
        for target, source in targets.items():
            if target.startswith("/docker-entrypoint-initdb.d/"):
                more = {
                    "PGHOST": str(data),
                    "PGPORT": str(port),
                    "PGPASSWORD": environment["POSTGRES_PASSWORD"],
                }
                self._run("postgres", ["bash", str(ROOT / source)], **more)
        self._run("postgres", ["pg_ctl", f"--pgdata={data}", "--wait", "stop"])
        return [*command, "-D", str(data)]

    def healthy(self, name: str) -> bool:
        """Whether the health check of the file is content."""
        done = subprocess.run(
            self.machine.health_command(name),
            env=self.environment(name),
            capture_output=True,
            timeout=60,
            check=False,
        )
        return done.returncode == 0

    def wait_until_healthy(self, name: str) -> None:
        end = time.monotonic() + START_S
        while not self.healthy(name):
            code = self.processes[name].poll()
            if code is not None or time.monotonic() > end:
                raise RuntimeError(f"{name} ({code}) does not become healthy:\n{self.logs()}")
            time.sleep(0.3)

    def family(self, name: str) -> list[psutil.Process]:
        """The processes that a service started, itself not included."""
        try:
            return psutil.Process(self.processes[name].pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def see_command_lines(self) -> None:
        """Remember what every process of the services shows to everybody on the machine."""
        for name in self.processes:
            for process in self.family(name):
                try:
                    self.command_lines.add(" ".join(process.cmdline()))
                except psutil.Error:
                    continue

    def stop(self, name: str) -> tuple[int, float]:
        """Stop a service as Docker does. Its exit code, and how long that took in seconds.

        Raises TimeoutExpired where it takes longer than its grace period.
        """
        process = self.processes.pop(name)
        grace_s = seconds(self.machine.services[name]["stop_grace_period"])
        began = time.monotonic()
        # The postgres image asks for INT: no new connections, and the open ones are ended.
        process.send_signal(signal.SIGINT if name == "postgres" else signal.SIGTERM)
        return process.wait(grace_s), time.monotonic() - began

    def kill(self) -> None:
        """Leave nothing behind."""
        families = [found for name in self.processes for found in self.family(name)]
        for process in self.processes.values():
            process.kill()
            process.wait()
        for child in families:
            if child.is_running():
                child.kill()
