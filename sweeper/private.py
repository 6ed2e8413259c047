"""What others must not see: files and folders of their owner only, texts without passwords.

Specs, logs, checkpoints and metrics are nobody else's business, and on a shared machine a home
folder stands beside others: its files are private whatever the umask. Data sets, and files that
somebody names (``init``, ``report --out``), follow the umask as everybody expects.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Final

FILE_MODE: Final = 0o600
FOLDER_MODE: Final = 0o700

_HIDDEN: Final = "***"
_WEB_LOGIN: Final = re.compile(r"(\bhttps?://)[^\s/?#\"'<>]*@", re.IGNORECASE)
_PASSWORD: Final = re.compile(
    r"(\b(?!https?:)[a-z][\w+.-]*://[^\s:/@]*):[^\s\"'<>]*@", re.IGNORECASE
)
_SECRET_FIELD: Final = re.compile(
    r"([?&;]\w*(?:password|passwd|pwd|secret|token|api_?key|access_key)="
    r"|\b(?:password|passwd)=)[^&;\s\"'<>]+",
    re.IGNORECASE,
)


def private_folder(folder: Path) -> Path:
    """Create ``folder`` and what is missing above it; what is there stays as it is."""
    missing = []
    for each in (folder, *folder.parents):
        if each.exists():
            break
        missing.append(each)
    for each in reversed(missing):
        each.mkdir(mode=FOLDER_MODE, exist_ok=True)
    folder.mkdir(mode=FOLDER_MODE, exist_ok=True)  # says so where it is something else
    return folder


def there(path: Path) -> Path:
    """``path``, or what of it is there: a folder above it, or a file in its way."""
    return next(
        each
        for each in (path, *path.parents)
        if os.path.exists(each)  # noqa: PTH110 - a Path's own way raises below a locked folder
    )


def private_opener(path: str, flags: int) -> int:
    """The ``opener`` of :func:`open` for a file that is private from its first moment."""
    return os.open(path, flags, FILE_MODE)


def private_file(file: Path) -> None:
    """Create ``file`` empty where it is missing, before a library creates it for all to read.

    One that is there is not opened: closing it again would take away every lock that this process
    has on it, SQLite's as well, and the next to close the database would delete its journal.
    """
    with contextlib.suppress(FileExistsError):
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, FILE_MODE))


def redacted(text: str) -> str:
    """``text`` without the secrets that addresses in it carry.

    That is what stands before the ``@`` of a web address (a token may stand without a user), the
    password of any other address, and fields such as ``password=`` and ``token=``.

    >>> redacted("postgresql://me:secret@host/db said no, https://token@host/ too")
    'postgresql://me:***@host/db said no, https://***@host/ too'
    """
    text = _WEB_LOGIN.sub(rf"\1{_HIDDEN}@", text)
    text = _PASSWORD.sub(rf"\1:{_HIDDEN}@", text)
    return _SECRET_FIELD.sub(rf"\1{_HIDDEN}", text)
