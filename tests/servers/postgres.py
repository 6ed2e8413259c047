"""PostgreSQL servers that tests start for themselves, may break, and leave nothing of.

The programs are those of the wheel pgserver, which were built without TLS, or the system's. Not in
pytest's folder, which nobody but its owner may enter: PostgreSQL refuses to run as root.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Final

import psutil
import sqlalchemy
from sqlalchemy.engine import URL

_START_S: Final = 60.0
_PORT: Final = 5432


def wheel() -> Path:
    """The folder of the programs in the wheel pgserver. Raises ImportError without it."""
    return Path(str(_pgserver().__file__)).parent / "pginstall/bin"


def with_tls() -> Path | None:
    """The folder of programs of this system that know TLS; None where there are none."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin")]
    if on_path := shutil.which("postgres"):
        found.append(Path(on_path).resolve().parent)
    for folder in sorted(found, reverse=True):
        with contextlib.suppress(OSError):
            built = subprocess.run(
                [folder / "pg_config", "--configure"], capture_output=True, text=True, check=False
            )
            if "openssl" in built.stdout and (folder / "initdb").exists():
                return folder
    return None


def account(programs: Path) -> int | None:
    """The user and the group that run ``programs`` where we are root; None where we are not."""
    if os.geteuid() != 0:
        return None
    pgserver = _pgserver()
    pgserver.utils.ensure_prefix_permissions(programs)
    pgserver.utils.ensure_user_exists("pgserver")
    return pwd.getpwnam("pgserver").pw_uid


def _pgserver() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of platformdirs, on machines without XDG_RUNTIME_DIR
        import pgserver.utils
    return pgserver


class Postgres:
    """A PostgreSQL server with its output in ``log``.

    It lets in everybody who reaches it, or who knows the superuser's ``password``. It is reached
    over a socket of this machine, or at a port of ``address``, by machines of the same network.
    ``certificate``: a certificate and its key, as PEM, for who asks for TLS.
    """

    def __init__(
        self,
        log: Path,
        *,
        address: str | None = None,
        password: str | None = None,
        certificate: tuple[bytes, bytes] | None = None,
        programs: Path | None = None,
    ) -> None:
        self._log = log
        self._address = address
        self._port = _free_port(address) if address else _PORT
        self._password = password
        self._programs = programs or wheel()
        self._account = account(self._programs)
        self._data = Path(tempfile.mkdtemp(prefix="pg"))
        self._own(self._data)
        self._initialise()
        if certificate is not None:
            self._encrypt(*certificate)
        self.start()

    @property
    def url(self) -> str:
        """The superuser's, of the database that every server has."""
        return self._place.render_as_string(hide_password=False)

    @property
    def _place(self) -> URL:
        place = URL.create(
            "postgresql+psycopg",
            username="postgres",
            password=self._password,
            database="postgres",
        )
        if self._address:
            return place.set(host=self._address, port=self._port)
        return place.set(query={"host": str(self._data)})

    def create(self, database: str) -> str:
        """Create an empty database; its URL."""
        self.execute(f'CREATE DATABASE "{database}"')
        return self._place.set(database=database).render_as_string(hide_password=False)

    def execute(self, *statements: str) -> None:
        """Run statements as the superuser, each in a transaction of its own."""
        with self._admin.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def start(self) -> None:
        """Start it, for the first time or after :meth:`kill`; it answers when this returns."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._data],
                cwd=self._data,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self._account,
                group=self._account,
                start_new_session=True,
            )
        until = time.monotonic() + _START_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"PostgreSQL does not start:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.02)

    def _is_ready(self) -> bool:
        try:
            said = (self._data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return said[:1] == [str(self._process.pid)] and "ready" in said[-1]

    @property
    def _processes(self) -> list[psutil.Process]:
        main = psutil.Process(self._process.pid)
        return [main, *main.children(recursive=True)]

    def kill(self) -> None:
        processes = self._processes
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(20)
        psutil.wait_procs(processes, timeout=20)

    def stop(self) -> None:
        """Let it take connections and answer nothing."""
        for process in self._processes:
            process.suspend()

    def go_on(self) -> None:
        """The end of :meth:`stop`."""
        for process in self._processes:
            process.resume()

    def close(self) -> None:
        """End it, and the sessions that are open."""
        if "_admin" in self.__dict__:
            self._admin.dispose()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
        shutil.rmtree(self._data)

    @cached_property
    def _admin(self) -> sqlalchemy.Engine:
        return sqlalchemy.create_engine(
            self._place, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool
        )

    def _initialise(self) -> None:
        words: Sequence[str | Path] = ("--auth=trust",)
        secret = self._data.with_name(f"{self._data.name}.password")
        method = "trust" if self._password is None else "scram-sha-256"
        if self._password is not None:
            secret.touch(mode=0o600)
            secret.write_text(self._password)
            self._own(secret)
            words = (f"--auth={method}", f"--pwfile={secret}")
        with self._log.open("ab") as log:
            subprocess.run(
                [
                    *(self._programs / "initdb", "--pgdata", self._data, *words),
                    *("--username=postgres", "--encoding=utf8", "--no-sync"),
                ],
                cwd=self._data,
                stdout=log,
                stderr=log,
                check=True,
                user=self._account,
                group=self._account,
            )
        secret.unlink(missing_ok=True)
        with (self._data / "pg_hba.conf").open("a") as rules:
            rules.write(f"host all all samenet {method}\n")
        self._set(
            listen_addresses=self._address or "",
            port=str(self._port),
            unix_socket_directories="" if self._address else str(self._data),
            fsync="off",  # nobody pulls the machine's plug
        )

    def _encrypt(self, certificate: bytes, key: bytes) -> None:
        for name, content in (("server.crt", certificate), ("server.key", key)):
            file = self._data / name
            file.touch(mode=0o600)
            file.write_bytes(content)
            self._own(file)
        self._set(ssl="on")

    def _set(self, **settings: str) -> None:
        with (self._data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())

    def _own(self, path: Path) -> None:
        if self._account is not None:
            os.chown(path, self._account, self._account)


def _free_port(address: str) -> int:
    with socket.create_server((address, 0)) as free:
        return int(free.getsockname()[1])
