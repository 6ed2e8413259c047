"""Opens the launcher `ray`: which cluster, and who may join it.

=================== ==========================================================================
``RAY_ADDRESS``     ``host:port`` of a cluster's head; ``auto`` for the one that runs on this
                    machine; unset or ``local``: this process starts its own, which ends with it
``RAY_AUTH_MODE``   ``token``: nobody joins without the token of ``RAY_AUTH_TOKEN``,
                    ``RAY_AUTH_TOKEN_PATH`` or ``~/.ray/auth_token``
=================== ==========================================================================

Ray listens on every network interface and runs what it is sent, so a cluster of our own always has
a token. Ray reads these variables when it is imported: they are settled before.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import MutableMapping
from typing import Final

from sweeper.errors import MissingExtraError, UsageError
from sweeper.launchers.base import Group, Launcher

_OWN: Final = "local"


def open_ray(group: Group) -> Launcher:
    """The launcher for the workers of ``group``.

    Raises:
        UsageError: the address is none of a head, or the group is to outlive this process and no
            cluster does.
        MissingExtraError: Ray is not installed.
        OutOfReachError: the cluster does not answer, or does not let us in.
    """
    address = os.environ.get("RAY_ADDRESS") or _OWN
    if "://" in address:
        raise UsageError(
            f"RAY_ADDRESS must be host:port of a cluster's head, but is {address!r}; launch on a "
            "machine of the cluster, without ray:// or http://"
        )
    if address == _OWN:
        if group.detached:
            raise UsageError(
                "--detach needs a Ray cluster that outlives this command, but RAY_ADDRESS names "
                "none; start one (ray start --head) and set RAY_ADDRESS=auto or host:port"
            )
        lock(os.environ)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to Ray's makers
    try:
        from sweeper.launchers.ray_cluster import RayLauncher
    except ImportError as error:
        raise MissingExtraError(
            "the launcher ray needs Ray, which is not installed; run: pip install 'sweeper[ray]'"
        ) from error
    return RayLauncher(group, address)


def lock(environment: MutableMapping[str, str]) -> None:
    """Give a cluster that is about to be started a token, unless somebody decided otherwise."""
    mode = environment.setdefault("RAY_AUTH_MODE", "token")
    if mode == "token" and "RAY_AUTH_TOKEN_PATH" not in environment:
        environment.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
