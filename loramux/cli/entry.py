"""The entry of ``loramux``, before its packages are loaded, which takes a moment in which Ctrl-C can come."""

import importlib
import sys

INTERRUPTED = 130


def main() -> None:
    """Load the command line and run it."""
    try:
        run = importlib.import_module("loramux.cli.main").main
    except ModuleNotFoundError as missing:
        sys.exit(
            f"loramux: the command line needs {missing.name}, not installed here: pip install 'loramux[cli]'"
        )
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    run()
