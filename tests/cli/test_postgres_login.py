"""Getting into a PostgreSQL server that asks for passwords and speaks TLS, and being refused."""

from __future__ import annotations

import contextlib
import datetime
import gc
import ipaddress
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from servers.postgres import Postgres, with_tls
from sqlalchemy.engine import URL

from sweeper import cli
from sweeper.store import open_store

pytestmark = pytest.mark.postgres

PASSWORD = "it's s3cr3t: @/%"
HOST = "127.0.0.1"


def certificate() -> tuple[bytes, bytes]:
    """A certificate of :data:`HOST` that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "database")])
    now = datetime.datetime.now(datetime.UTC)
    host = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))])
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(host, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return signed.public_bytes(Encoding.PEM), pem


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """A server with the role ``me``, who owns ``sweeps``, and the role ``guest``, who owns nothing.

    ``root`` is the file with its certificate, ``other`` one with another server's.
    """

    url: URL
    root: Path
    other: Path

    def as_(self, **changes: str) -> str:
        """The URL, without a password."""
        return self.url.set(**changes).render_as_string()  # type: ignore[arg-type]  # never a port

    def with_tls(self, root: Path, **parameters: str) -> str:
        query = {"sslmode": "verify-full", "sslrootcert": str(root), **parameters}
        return self.url.update_query_dict(query).render_as_string()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    pytest.importorskip("pgserver", reason="the wheel pgserver is not installed")
    folder = tmp_path_factory.mktemp("guarded")
    own, other, programs = certificate(), certificate(), with_tls()
    server = Postgres(
        folder / "postgres.log",
        address=HOST,
        password="the superuser's",
        certificate=own if programs else None,
        programs=programs,
    )
    quoted = PASSWORD.replace("'", "''")
    with contextlib.closing(server):
        server.execute(
            f"CREATE ROLE me LOGIN PASSWORD '{quoted}'".replace("%", "%%"),
            f"CREATE ROLE guest LOGIN PASSWORD '{quoted}'".replace("%", "%%"),
            "CREATE ROLE nobody",
            "CREATE DATABASE sweeps OWNER me",
            "CREATE DATABASE empty",
        )
        for name, (content, _) in {"root.crt": own, "other.crt": other}.items():
            (folder / name).write_bytes(content)
        url = (
            sqlalchemy.make_url(server.url)
            .set(username="me", database="sweeps")
            ._replace(password=None)
        )
        yield Guarded(url=url, root=folder / "root.crt", other=folder / "other.crt")


@pytest.fixture
def encrypted(guarded: Guarded) -> Guarded:
    if with_tls() is None:
        pytest.skip("this machine has no PostgreSQL with TLS (Debian: postgresql)")
    return guarded


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever runs the tests may have a login of their own."""
    for name in ("PGPASSWORD", "PGSSLMODE", "PGSSLROOTCERT", "SWEEPER_STORE", "SWEEPER_STORE_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "no such file"))
    monkeypatch.setenv("SWEEPER_HOME", str(tmp_path))


Status = Callable[..., tuple[int, str]]


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Status:
    """Exit code and output of ``sweeper status``; no password is in the output."""

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["sweeper", "status", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert "s3cr3t" not in out + err
        return int(ended.value.code or 0), err or out

    return run


def pgpass(file: Path, url: URL, password: str) -> Path:
    """A password file for ``url``, as libpq demands it."""
    escaped = password.replace("\\", "\\\\").replace(":", "\\:")
    file.touch(mode=0o600)
    file.write_text(f"{url.host}:{url.port}:{url.database}:{url.username}:{escaped}\n")
    return file


@pytest.mark.parametrize("how", ["PGPASSFILE", "PGPASSWORD", "SWEEPER_STORE", "SWEEPER_STORE_FILE"])
def test_the_password_is_found_wherever_it_may_be(
    how: str, guarded: Guarded, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = guarded.url.set(password=PASSWORD).render_as_string(hide_password=False)
    file = tmp_path / "secret"
    if how == "PGPASSFILE":
        pgpass(file, guarded.url, PASSWORD)
    else:
        file.write_text(whole)
    values = {"PGPASSWORD": PASSWORD, "SWEEPER_STORE": whole}
    monkeypatch.setenv(how, values.get(how, str(file)))
    words = ["--store", guarded.as_()] if how.startswith("PG") else []
    assert status(*words) == (0, "no study in this store yet\n")


@pytest.mark.parametrize(
    ("password", "changes", "said", "advice"),
    [
        (None, {}, "no password supplied", "set PGPASSWORD"),
        ("not s3cr3t", {}, 'password authentication failed for user "me"', "PGPASSFILE"),
        (PASSWORD, {"username": "stranger"}, "password authentication failed", "must exist"),
        (PASSWORD, {"username": "nobody"}, "password authentication failed", "must exist"),
        (
            PASSWORD,
            {"database": "nowhere"},
            'database "nowhere" does not exist',
            'CREATE DATABASE "nowhere" OWNER "me"',
        ),
    ],
)
def test_a_refusal_is_exit_code_three_with_what_to_do(
    password: str | None,
    changes: dict[str, str],
    said: str,
    advice: str,
    guarded: Guarded,
    status: Status,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if password is not None:
        monkeypatch.setenv("PGPASSWORD", password)
    code, found = status("--store", guarded.as_(**changes))
    assert code == 3
    assert said in found and advice in found
    assert len(found.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"database": "empty"},
            'permission denied for schema public; .* ALTER DATABASE "empty" OWNER TO "me"',
        ),
        ({"username": "guest"}, "permission denied for .*; the role must own the database, and"),
    ],
)
def test_a_role_without_rights_is_told_which_it_needs(
    changes: dict[str, str],
    said: str,
    guarded: Guarded,
    status: Status,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    with contextlib.closing(open_store(guarded.as_())):
        pass  # the tables are there
    with warnings.catch_warnings():  # Optuna is stopped halfway and leaves its connection behind
        warnings.simplefilter("ignore", ResourceWarning)
        code, found = status("--store", guarded.as_(**changes))
        gc.collect()
    assert code == 3
    assert re.search(said, found)


def test_a_role_that_may_not_come_in_or_is_not_there_is_named(
    postgres_database: Callable[[], str], status: Status
) -> None:
    """A server that asks for no password says more."""
    url = sqlalchemy.make_url(postgres_database())
    code, found = status("--store", url.set(username="stranger").render_as_string())
    assert code == 3
    assert "CREATE ROLE \"stranger\" LOGIN PASSWORD '…'" in found
    with contextlib.closing(open_store(url.render_as_string())) as store, store.writing() as admin:
        admin.exec_driver_sql("CREATE ROLE locked_out")
    code, found = status("--store", url.set(username="locked_out").render_as_string())
    assert code == 3
    assert 'ALTER ROLE "locked_out" LOGIN' in found


@pytest.mark.parametrize(
    ("parameter", "said"),
    [("sslmode=nonsense", 'invalid sslmode value: "nonsense"'), ("sslmod=require", '"sslmod"')],
)
def test_what_the_client_does_not_know_is_wrong_usage(
    parameter: str, said: str, guarded: Guarded, status: Status
) -> None:
    code, found = status("--store", f"{guarded.as_()}?{parameter}")
    assert code == 2
    assert said in found


def test_a_password_file_that_others_can_read_is_not_used(
    guarded: Guarded, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = pgpass(tmp_path / "pgpass", guarded.url, PASSWORD)
    file.chmod(0o644)
    monkeypatch.setenv("PGPASSFILE", str(file))
    code, found = status("--store", guarded.as_())
    assert code == 3
    assert "has group or world access" in found and "a file that only you can read" in found


@pytest.mark.parametrize("where", ["url", "environment"])
def test_a_certificate_that_the_root_signed_lets_in_and_all_is_encrypted(
    where: str, encrypted: Guarded, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    url = encrypted.with_tls(encrypted.root)
    if where == "environment":
        url = encrypted.as_()
        monkeypatch.setenv("PGSSLMODE", "verify-full")
        monkeypatch.setenv("PGSSLROOTCERT", str(encrypted.root))
    assert status("--store", url) == (0, "no study in this store yet\n")
    with contextlib.closing(open_store(url)) as store, store.reading() as connection:
        spoken = "SELECT ssl, version FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        assert connection.exec_driver_sql(spoken).one() == (True, "TLSv1.3")


def test_a_server_that_cannot_prove_its_name_is_refused(
    encrypted: Guarded, status: Status, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    elsewhere = sqlalchemy.make_url(encrypted.with_tls(encrypted.root, hostaddr=HOST))
    cases = {
        encrypted.with_tls(encrypted.other): (
            "certificate verify failed",
            "sslrootcert in the URL, or PGSSLROOTCERT",
        ),
        encrypted.with_tls(tmp_path / "missing.crt"): (
            'missing.crt" does not exist',
            "sslrootcert in the URL, or PGSSLROOTCERT",
        ),
        elsewhere.set(host="db.example.org").render_as_string(): (
            'does not match host name "db.example.org"',
            "name the host in the URL as its certificate does",
        ),
    }
    for url, parts in cases.items():
        code, found = status("--store", url)
        assert code == 3
        assert all(part in found for part in parts), found
