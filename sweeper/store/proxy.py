"""The server side of ``grpc://``: Optuna's proxy, and our own calls beside it, for one database."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Self

from optuna.exceptions import UpdateFinishedTrialError

from sweeper.errors import StoreUnreachableError, UsageError
from sweeper.store import overview, queue, tables, workers
from sweeper.store.cache import RecentStorage
from sweeper.store.database import Store, open_store
from sweeper.store.refusals import reaching
from sweeper.store.remote import METHOD, require_grpc

_THREADS: Final = 32
_CONNECTIONS: Final = 16
_SLACK_S: Final = 1.0
"""Trials may be so old when samplers and pruners compare: one reading serves all that ask."""


def _hello(_store: Store) -> None:
    return None


def _claim(store: Store, study_id: int, worker: str) -> dict[str, Any] | None:
    claimed = queue.claim(store, study_id, worker)
    if claimed is None:
        return None
    if isinstance(store.storage, RecentStorage):
        store.storage.know(study_id, store.storage.get_trial(claimed.trial_id))
    return {**dataclasses.asdict(claimed), "failed": dict(claimed.failed)}


def _report(store: Store, rows: list[tuple[int, int, float]]) -> list[int]:
    reports: dict[int, dict[int, float]] = defaultdict(dict)
    for trial_id, epoch, value in rows:
        reports[trial_id][epoch] = value
    with store.writing() as connection:
        return sorted(tables.write_reports(connection, reports))


def _rungs(store: Store, trial_id: int, rungs: dict[str, float], facts: dict[str, Any]) -> bool:
    """Whether the trial is there and has not ended."""
    try:
        store.storage.set_rungs(trial_id, rungs, facts)
    except (UpdateFinishedTrialError, KeyError):
        return False
    return True


def _beat(store: Store, trial_ids: list[int]) -> None:
    with store.writing() as connection:
        tables.write_beats(connection, trial_ids)


def _tell(store: Store, **said: Any) -> None:
    workers.tell(store, workers.told_by(said))


CALLS: Final[Mapping[str, Callable[..., Any]]] = {
    "hello": _hello,
    "claim": _claim,
    "report": _report,
    "rungs": _rungs,
    "beat": _beat,
    "queued": overview.queued,
    "tell": _tell,
    "leave": workers.leave,
}
"""What a worker may ask for beside Optuna's own calls, by name."""


class ProxyServer:
    """Serves the database of ``store_url`` at ``host:port`` while the context lasts.

    Raises UsageError where the port cannot be had, MissingExtraError without grpcio.
    """

    def __init__(self, store_url: str, host: str, port: int) -> None:
        require_grpc()
        self._store_url = store_url
        self._place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.port = port

    def __enter__(self) -> Self:
        import grpc
        from optuna.storages._grpc.auto_generated import api_pb2_grpc
        from optuna.storages._grpc.servicer import OptunaStorageProxyService

        self._store = open_store(self._store_url, pool=_CONNECTIONS, slack_s=_SLACK_S)
        server = grpc.server(
            ThreadPoolExecutor(_THREADS, thread_name_prefix="grpc"),
            interceptors=[_translator(self._store)],
            options=[("grpc.so_reuseport", 0)],
        )
        add = api_pb2_grpc.add_StorageServiceServicer_to_server
        add(OptunaStorageProxyService(self._store.storage), server)  # type: ignore[no-untyped-call]  # generated
        service, _, method = METHOD.strip("/").partition("/")
        call = grpc.unary_unary_rpc_method_handler(self._call)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {method: call}),)
        )
        try:
            self.port = server.add_insecure_port(self._place)
        except RuntimeError as error:
            self._store.close()
            raise UsageError(
                f"the gRPC proxy must listen on {self._place}, but that cannot be had: {error}"
            ) from error
        server.start()
        self._server = server
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.stop(2.0).wait(5.0)
        self._store.close()

    def _call(self, request: bytes, context: Any) -> bytes:
        import grpc

        asked = json.loads(request)
        call = CALLS.get(asked["call"])
        if call is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, f"no call {asked['call']!r} here")
            return b""
        return json.dumps(call(self._store, **asked["arguments"])).encode()


def _translator(store: Store) -> Any:
    """An interceptor that says UNAVAILABLE where the database does not answer."""
    import grpc

    class Translator(grpc.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
        def intercept_service(self, continuation: Any, details: Any) -> Any:
            handler = continuation(details)
            if handler is None or handler.unary_unary is None:
                return handler

            def act(request: Any, context: Any) -> Any:
                try:
                    with reaching(store.url):
                        return handler.unary_unary(request, context)
                except StoreUnreachableError as error:
                    context.abort(grpc.StatusCode.UNAVAILABLE, str(error))

            return grpc.unary_unary_rpc_method_handler(
                act, handler.request_deserializer, handler.response_serializer
            )

    return Translator()
