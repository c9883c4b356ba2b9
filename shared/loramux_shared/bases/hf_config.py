"""A checkpoint's ``config.json``, read with types; a value that is not served is refused by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loramux_shared.faults import CheckpointInvalid
from loramux_shared.untrusted_json import JsonInvalid, parse_json


class HfConfig:
    """The fields of a decoder. A key that is absent gives the default; so does null, unless it means None."""

    def __init__(
        self, fields: Mapping[str, Any], architecture: str, max_seq_len: int | None = None, at: str = ""
    ) -> None:
        """Take the fields; max_seq_len is what the deployment asks for, if it does, at where a block stands."""
        self.fields = fields
        self.at = at
        self.architecture = architecture
        self.max_seq_len = max_seq_len

    def integer(self, key: str, default: int) -> int:
        """Return a whole number."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._unexpected(key, "a whole number")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Return a positive whole number; without a default it must be there."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointInvalid(
                f"config.json: {self.at}{key}: expected a positive integer, found {value!r:.80}. "
                "The base must be a decoder checkpoint in Hugging Face format."
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number; without a default it must be there."""
        value = self._get(key, default)
        if not _is_number(value):
            raise self._unexpected(key, "a number")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """Return a number above 0; without a default it must be there."""
        value = self.number(key, default)
        if value <= 0:
            raise self._unexpected(key, "a positive number")
        return value

    def numbers(self, key: str) -> list[float]:
        """Return a list of numbers; an empty one where there is none."""
        values = self.array(key) or []
        if not all(map(_is_number, values)):
            raise self._unexpected(key, "a list of numbers")
        return [float(value) for value in values]

    def flag(self, key: str, *, default: bool) -> bool:
        """Return true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._unexpected(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """Return a string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._unexpected(key, "a string")
        return value

    def array(self, key: str) -> list[Any] | None:
        """Return a list; None where there is none."""
        value = self.fields.get(key)
        if value is not None and not isinstance(value, list):
            raise self._unexpected(key, "a list")
        return value

    def integer_or_none(self, key: str, default: int | None) -> int | None:
        """Return a whole number; null means None, and only an absent key the default."""
        if key not in self.fields:
            return default
        return None if self.fields[key] is None else self.integer(key, 0)

    def number_or_none(self, key: str, default: float | None) -> float | None:
        """Return a number; null means None, and only an absent key the default."""
        if key not in self.fields:
            return default
        return None if self.fields[key] is None else self.number(key, 0.0)

    def block(self, key: str) -> HfConfig:
        """Return an object; an empty one where there is none."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self._unexpected(key, "an object")
        return HfConfig(value, self.architecture, self.max_seq_len, f"{self.at}{key}." if self.at else "")

    def require(self, key: str, *served: Any) -> None:
        """Refuse any other value of a key than these; the first is meant where it is absent or null."""
        value = self._get(key, served[0])
        if value not in served:
            names = ", ".join(json.dumps(item) for item in served)
            raise CheckpointInvalid(
                f"config.json: {self.at}{key} {json.dumps(value):.80} is not supported for "
                f"{self.architecture}; supported: {names}."
            )

    def _get(self, key: str, default: Any) -> Any:
        value = self.fields.get(key)
        return default if value is None else value

    def _unexpected(self, key: str, expected: str) -> CheckpointInvalid:
        return CheckpointInvalid(
            f"config.json: {self.at}{key}: expected {expected}, found {self.fields.get(key)!r:.80}."
        )


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # not infinite, not NaN, and no integer beyond float's range


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object of a file, None where there is none; raise CheckpointInvalid for something else."""
    try:
        data = parse_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except JsonInvalid as error:
        raise CheckpointInvalid(f"{path.name} is not valid JSON.") from error
    if not isinstance(data, dict):
        raise CheckpointInvalid(f"{path.name}: expected an object, found {type(data).__name__}.")
    return data
