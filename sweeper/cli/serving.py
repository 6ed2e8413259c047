"""Commands of a cluster: ``controller`` looks after all studies, ``workers`` lists who trains."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Annotated, Final

import typer

from sweeper.address import refuse_tracking_uri
from sweeper.cli.options import HomeOption, JsonOption, StoreOption
from sweeper.cli.plain import PlainFormatter, plain
from sweeper.errors import StoreUnreachableError, UsageError
from sweeper.settings import Settings, masked

if TYPE_CHECKING:
    from sweeper.service.board import Board
    from sweeper.service.watch import Watch
    from sweeper.store import Store
    from sweeper.worker import Signals

_log = logging.getLogger(__name__)

_LOOK_S: Final = 2.0
_LEAVE_S: Final = 10.0
_AWAY_PAUSE_S: Final = 5.0


def controller(
    store: StoreOption = None,
    home: HomeOption = None,
    host: Annotated[
        str, typer.Option(help="Where /healthz, /livez and /metrics are served.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Their port; 0: any.")] = 8321,
    grpc: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Serve the store to workers with --store grpc://HOST:PORT."
        ),
    ] = None,
    insecure_grpc: Annotated[
        bool,
        typer.Option(
            "--insecure-grpc",
            help="Let --grpc listen beyond this machine: without login or encryption, whoever "
            "reaches the port can read and change every study.",
        ),
    ] = False,
    allow_imports: Annotated[
        bool,
        typer.Option("--allow-imports", help="Import models of their own for studies' reports."),
    ] = False,
) -> None:
    """Look after all studies of a store: find lost trials, retry, finish and report; until TERM."""
    to_stderr = logging.StreamHandler(sys.stderr)
    to_stderr.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[to_stderr])
    settings = Settings.resolve(home=home, store=store)
    refuse_tracking_uri(settings.tracking_uri)
    proxy = None if grpc is None else _place(grpc, beyond=insecure_grpc)
    from sweeper.service.board import Board
    from sweeper.service.endpoint import Endpoint
    from sweeper.service.watch import Watch
    from sweeper.store.proxy import ProxyServer
    from sweeper.tracking import TrackingService
    from sweeper.worker import Signals, StopNowError

    signals, board = Signals(), Board()
    watch: Watch | None = None
    signals.install()
    with contextlib.suppress(StopNowError), contextlib.ExitStack() as stack:
        endpoint = stack.enter_context(Endpoint(board, host, port))
        _log.info("%s/healthz, /livez and /metrics", endpoint.address)
        opened = _open(settings, board, signals)
        if opened is not None:
            if proxy is not None:
                served = stack.enter_context(ProxyServer(settings.store_url, *proxy))
                _log.info("workers may use --store grpc://%s:%d", proxy[0], served.port)
            service = stack.enter_context(TrackingService(settings))
            watch = Watch(
                store=opened,
                settings=settings,
                service=service,
                board=board,
                allow_imports=allow_imports,
            )
            _look_after(watch, signals)
    code = 130 if signals.number == signal.SIGINT else 0
    sys.stderr.flush()
    if watch is not None and not watch.finisher.close(0):
        os._exit(code)  # a report is being written: whoever comes next writes it anew
    raise typer.Exit(code)


def _open(settings: Settings, board: Board, signals: Signals) -> Store | None:
    """The store, however long that takes; None where a signal comes first."""
    from sweeper.store import open_store

    said = ""
    while not signals.stopping:
        board.turn()
        try:
            opened = open_store(settings.store_url)
        except StoreUnreachableError as error:
            board.complain(str(error))
            if str(error) != said:
                said = str(error)
                _log.warning("waiting for the store: %s", error)
            _pause(_AWAY_PAUSE_S, signals)
        else:
            _log.info("looking after the studies of %s", masked(settings.store_url))
            _ = opened.backend  # a controller needs the database itself
            return opened
    return None


def _look_after(watch: Watch, signals: Signals) -> None:
    """Look, again and again, until a signal arrives; outages are waited out."""
    away_since: float | None = None
    trouble = ""
    while not signals.stopping:
        watch.board.turn()
        now = watch.service.look_after()
        if now and now != trouble:
            _log.warning("MLflow: %s", now)
        trouble = now
        try:
            watch.look()
        except StoreUnreachableError as error:
            watch.board.complain(str(error))
            if away_since is None:
                away_since = time.monotonic()
                _log.warning("waiting for the store: %s", error)
            _pause(_AWAY_PAUSE_S, signals)
            continue
        if away_since is not None:
            _log.info("the store answers again after %.0f s", time.monotonic() - away_since)
            away_since = None
        _pause(_LOOK_S, signals)
    _log.info("ending")
    watch.finisher.close(_LEAVE_S)


def _pause(seconds: float, signals: Signals) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not signals.stopping:
        time.sleep(0.1)


def _place(text: str, *, beyond: bool) -> tuple[str, int]:
    """Host and port of ``--grpc``. Raises UsageError where others could reach it unasked."""
    from sweeper.store.remote import PORT

    host, colon, port = text.rpartition(":")
    if not colon:
        host, port = text, str(PORT)
    host = host.strip("[]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--grpc must be HOST:PORT, such as 127.0.0.1:{PORT}, but got {text!r}")
    if not beyond and not _is_loopback(host):
        raise UsageError(
            f"--grpc must listen on this machine alone, such as 127.0.0.1:{PORT}, but got "
            f"{text!r}: the proxy has neither login nor encryption. In a network that nobody else "
            "reaches, allow it with --insecure-grpc; elsewhere forward the port, with ssh, say"
        )
    return host, int(port)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def workers(store: StoreOption = None, home: HomeOption = None, json_: JsonOption = False) -> None:
    """List every worker of the store: where it is, what it trains, and how fast."""
    from sweeper.cli.printing import duration, out, print_json, text
    from sweeper.store import open_store
    from sweeper.store.workers import listed

    settings = Settings.resolve(home=home, store=store)
    with contextlib.closing(open_store(settings.store_url)) as opened:
        found = listed(opened)
    if json_:
        print_json([row.public() for row in found])
        return
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("worker", "host", "device", "launcher", "trial"):
        table.add_column(column)
    for column in ("heartbeat", "samples/s"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in found:
        who = row.presence
        trials = " ".join(map(str, who.trials))
        words = (who.name, who.host, who.device, who.launcher)
        table.add_row(
            *(text(plain(word)) for word in words),
            text(plain(f"{who.study} {trials}")) if who.study else "–",
            f"{duration(row.silent_s)} ago",
            "–" if who.samples_per_s is None else f"{who.samples_per_s:,.0f}",
            ("" if row.alive else "[red]silent[/] ") + text(plain(who.problem or "")),
        )
    out().print(table if found else "nobody works on this store")
