"""``python -m sweeper`` is the console script ``sweeper``."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        # Python puts the current folder first. What happens to lie there must not be imported,
        # neither as a model that a study names nor in place of an installed package.
        del sys.path[0]
    from sweeper.cli import run

    run()
