"""What finishing a study loads while the last trials train."""

from __future__ import annotations

import subprocess
import sys


def test_all_that_is_loaded_ahead_is_there() -> None:
    """In a process of its own: a name that no longer exists would be passed over in silence."""
    code = (
        "import sys\n"
        "from sweeper.service import finish\n"
        "assert not set(finish._LATER) & set(sys.modules), 'it is loaded with finish itself'\n"
        "ahead = finish.Ahead()\n"
        "ahead.start()\n"
        "ahead.wait()\n"
        "print(*(name for name in finish._LATER if name not in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
