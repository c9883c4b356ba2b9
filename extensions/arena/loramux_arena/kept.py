"""Rows in a file, a JSON object per line, as soon as each is whole: what was asked once is not asked again."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self, TypeVar, get_type_hints

from loramux_arena.records import Answer, Likelihood, Row, Verdict
from loramux_shared.faults import Finding, RequestInvalid, SettingsInvalid
from loramux_shared.untrusted_json import parse_json

KINDS: Final[Mapping[str, type[Row]]] = {"answer": Answer, "likelihood": Likelihood, "verdict": Verdict}
EXCERPT: Final = 80
_WRITTEN: Final[Mapping[Any, Any]] = {float: float | int, float | None: float | int | None}
"""Types that JSON may have for a field's type."""
_R = TypeVar("_R", bound=Row)


class AnswerFile:
    """A file of rows: those that it had, and those that come.

    A line that its writer did not end, because it was killed, is passed over; what comes stands behind it in a
    line of its own. Rows hold prompts' answers, so a new file is its owner's alone.
    """

    def __init__(self, path: Path) -> None:
        """Open or begin a file.

        Raises:
            RequestInvalid: a line of it is no row.
            SettingsInvalid: it cannot be read or written.
        """
        self.path = path
        self._rows: dict[tuple[str, str], Row] = {}
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            self._file: IO[str] = os.fdopen(
                os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w", encoding="utf-8"
            )
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise SettingsInvalid(f"cannot keep answers in {path}: {why}") from error
        try:
            self._read(text)
        except RequestInvalid:
            self._file.close()
            raise
        if text and not text.endswith("\n"):
            self._write("\n")

    def __len__(self) -> int:
        return len(self._rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._named():
            self._file.close()
        if not self._rows and self.path.is_file() and not self.path.stat().st_size:
            self.path.unlink()  # the run stored nothing; a device such as /dev/null stays

    def get(self, kind: type[_R], key: str) -> _R | None:
        """Return the row of a key; None where there is none."""
        found = self._rows.get((kind.__name__, key))
        return found if isinstance(found, kind) else None

    def put(self, row: Row) -> None:
        """Keep a row: it is in the file when this returns."""
        self._rows[type(row).__name__, row.key] = row
        kind = next(name for name, each in KINDS.items() if each is type(row))
        self._write(json.dumps({"kind": kind, **asdict(row)}) + "\n")

    def _write(self, text: str) -> None:
        with self._named():
            self._file.write(text)
            self._file.flush()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Say of which file it is that the system refuses something: a full disk does not."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _read(self, text: str) -> None:
        findings = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = _row(parse_json(line))
            except (ValueError, TypeError, RecursionError) as error:
                if not _is_torn(line):
                    findings.append(
                        Finding(
                            code="E_BAD_FIELD",
                            where=f"line {number}",
                            expected="an answer, likelihood or verdict that an arena kept",
                            found="no JSON"
                            if isinstance(error, json.JSONDecodeError)
                            else str(error)[:EXCERPT],
                        )
                    )
            else:
                self._rows[type(row).__name__, row.key] = row
        if findings:
            raise RequestInvalid(
                f"{self.path} is not a file of kept answers. Name another, or a new one", findings
            )


def _is_torn(line: str) -> bool:
    """Return True if a line is the beginning of a row that was never ended."""
    return line.startswith('{"kind": "') and not line.endswith("}")


def _row(found: Any) -> Row:
    """Return the row of a line.

    Raises:
        ValueError: it is none, or has an unknown field.
        TypeError: a field is missing or of another type.
    """
    if not isinstance(found, dict) or found.get("kind") not in KINDS:
        raise ValueError("no object with a kind")
    kind = KINDS[found.pop("kind")]
    known = get_type_hints(kind)
    for name, stated in known.items():
        if not isinstance(found.get(name), _WRITTEN.get(stated, stated)):
            raise TypeError(f"{name}: {json.dumps(found.get(name))}")
    if unknown := set(found) - set(known):
        raise ValueError(f"unknown field {sorted(unknown)[0]}")
    return kind(**found)
