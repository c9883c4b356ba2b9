"""Records as JSON documents: what ``--json`` prints."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from loramux_shared.faults import Fault

SCHEMA = 2
"""Version of every document; raised when a field changes its meaning or is removed."""


def emit(document: Mapping[str, Any]) -> None:
    """Print a document on stdout: indented, with nothing else beside it."""
    _write(json.dumps({"schema": SCHEMA} | jsonable(document), indent=2))


def emit_line(document: Mapping[str, Any]) -> None:
    """Print one of several documents on stdout, in a line."""
    _write(json.dumps({"schema": SCHEMA} | jsonable(document)))


def jsonable(value: Any) -> Any:
    """Return a value in JSON's terms: records and models as objects, times in ISO 8601, failures by reason."""
    if isinstance(value, Fault):
        return {"reason": value.reason, "message": value.message, "findings": jsonable(value.findings)}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): jsonable(item) for name, item in value.items()}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [jsonable(item) for item in value]
    return value


def _write(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
