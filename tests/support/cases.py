"""Tables of tests that are data: a JSON file beside the module that reads it."""

import json
from pathlib import Path
from typing import Any


def cases(module: str, name: str) -> Any:
    """Return a table of the JSON file beside a module, which is given by its `__file__`."""
    return json.loads(Path(module).with_suffix(".json").read_text())[name]
