"""The entry of ``loramux``, before its packages are loaded, which takes a moment in which Ctrl-C can come."""

import importlib
import sys

INTERRUPTED = 130


def main() -> None:
    """Load the command line and run it."""
    try:
        run = importlib.import_module("loramux.cli.main").main
    except ModuleNotFoundError as missing:
        sys.exit(needs(missing))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    run()


def needs(missing: ModuleNotFoundError) -> str:
    """Return the line that names a package of the command line that is not installed, and its cure."""
    return f"loramux: the command line needs {missing.name}, not installed here: pip install 'loramux[cli]'"
