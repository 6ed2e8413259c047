"""What a device was measured to do, kept in a JSON file of the home folder for its owner only.

Several workers may write: the last one wins, and no reader finds half a file. A file that cannot be
read or written costs a measurement, never a trial.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sweeper.private import private_folder, private_opener

_log = logging.getLogger(__name__)

STEP: Final = "step 3"
"""Part of the keys: what was measured of an older training step of sweeper's own is of no use."""


def read(file: Path) -> Mapping[str, Any]:
    """All entries by key; none where there is no file, or none that makes sense."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def keep(file: Path, key: str, entry: Mapping[str, Any]) -> None:
    """Add an entry, or put it in the place of the one that was there."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    content = {**read(file), key: entry}
    try:
        private_folder(file.parent)
        with open(temporary, "w", encoding="utf-8", opener=private_opener) as stream:
            json.dump(content, stream, indent=1, sort_keys=True)
        temporary.replace(file)
    except OSError as error:
        _log.warning("what was measured cannot be kept in %s: %s", file, error)
