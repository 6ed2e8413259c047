"""A store behind a controller: Optuna's gRPC proxy, and beside it the calls that it lacks.

For more workers than the database has connections. Optuna's proxy passes on what samplers and
pruners need, but knows no heartbeat, and through it a claim would be five calls, and what a cohort
says of an epoch as many as it has members. So the controller offers a second service on the same
port, ``CALLS`` in `sweeper.store.proxy`: the call's name and its arguments as JSON one way, the
result as JSON back. A claim is one call, carried out where the database is, and is the same
compare-and-set as everywhere.

The channel is neither encrypted nor authenticated.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import GrpcStorageProxy
from sqlalchemy.engine import URL

from sweeper.errors import MissingExtraError

METHOD: Final = "/sweeper.Store/Call"
PORT: Final = 13000
_TIMEOUT_S: Final = 60.0
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.max_reconnect_backoff_ms", 10_000),
)


class RemoteStorage(GrpcStorageProxy):
    """Optuna's client with a limit to every call, and :meth:`call` for what Optuna does not offer.

    Whatever fails is raised as ``grpc.RpcError``, which `sweeper.store.refusals.reaching` knows.
    """

    def call(self, what: str, /, **arguments: Any) -> Any:
        """What the controller answers to one of its own calls."""
        request = json.dumps({"call": what, "arguments": arguments}).encode()
        return json.loads(self._call(request))

    def set_rungs(
        self, trial_id: int, rungs: Mapping[str, float], facts: Mapping[str, Any]
    ) -> None:
        """As of the storage that the controller has, but without its KeyError."""
        if not self.call("rungs", trial_id=trial_id, rungs=rungs, facts=facts):
            raise UpdateFinishedTrialError(f"trial {trial_id} has ended or is gone")

    @contextlib.contextmanager
    def recent(self, slack_s: float) -> Iterator[None]:
        """Nothing: the controller decides how old trials may be."""
        yield

    def _setup(self) -> None:
        import grpc
        from optuna.storages._grpc.auto_generated import api_pb2_grpc
        from optuna.storages._grpc.client import GrpcClientCache

        channel = grpc.insecure_channel(f"{self._host}:{self._port}", options=_OPTIONS)
        self._channel = grpc.intercept_channel(channel, _limit())
        self._bare = channel
        self._stub = api_pb2_grpc.StorageServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        self._cache = GrpcClientCache(self._stub)
        self._call: Callable[[bytes], bytes] = self._channel.unary_unary(METHOD)

    def close(self) -> None:
        """Close the channel."""
        self._bare.close()


def connect(address: URL) -> RemoteStorage:
    """The storage at ``grpc://host:port``, once a controller has answered.

    Raises:
        MissingExtraError: grpcio is not installed.
        grpc.RpcError: nobody answers.
    """
    require_grpc()
    name = str(address.host)
    host = f"[{name}]" if ":" in name else name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        storage = RemoteStorage(host=host, port=address.port or PORT)
    storage.call("hello")
    return storage


def require_grpc() -> None:
    """Raise MissingExtraError where grpcio is not installed."""
    try:
        import grpc  # noqa: F401 - it is looked whether it is there
    except ImportError as error:
        raise MissingExtraError(
            "grpc:// needs grpcio, which is not installed; run: pip install 'sweeper[grpc]'"
        ) from error


def _limit() -> Any:
    """An interceptor that ends every call after a minute: a server that hangs must not hang us."""
    import grpc

    class Limit(grpc.UnaryUnaryClientInterceptor):  # type: ignore[misc]  # grpc has no types
        def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
            return continuation(details._replace(timeout=details.timeout or _TIMEOUT_S), request)

    return Limit()
