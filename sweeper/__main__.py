"""``python -m sweeper`` is the console script ``sweeper``."""

from sweeper.cli import main

if __name__ == "__main__":
    main()
