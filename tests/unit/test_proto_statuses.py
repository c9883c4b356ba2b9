"""What the protos say about failures, against the failures that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loramux_shared.faults import FAULTS

PROTOS = sorted((Path(__file__).resolve().parents[2] / "protos").rglob("*.proto"))
_LINE = re.compile(r"^ *// (?P<status>[A-Z_]{6,}) +(?P<reason>[A-Z_]{4,})[:,]", re.MULTILINE)
_MORE = re.compile(r"(?<=[ ,])(?P<reason>[A-Z]+(?:_[A-Z]+)+)(?=[:,])")
EVERYWHERE = {"UNAUTHENTICATED", "PERMISSION_DENIED", "SHUTTING_DOWN"}
ELSEWHERE = {
    "SERVER_UNAVAILABLE",  # a client's own word
    "SETTINGS_INVALID",  # ends a process, as the next does
    "PROOF_FAILED",
    "BUILD_INTERRUPTED",  # the build goes on when the builder starts again
    "INTERNAL",  # nobody's intention
}


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.stem)
def test_reasons_stand_beside_their_status(path: Path) -> None:
    """A reason that a comment names is one of ours, and has the status beside which it stands."""
    found = list(_LINE.finditer(path.read_text(encoding="utf-8")))
    assert len(found) > 5
    for line in found:
        assert FAULTS[line["reason"]].status.name == line["status"], line[0]


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.stem)
def test_what_every_rpc_can_end_with_is_said(path: Path) -> None:
    """Keys and draining are told once, for the whole service."""
    text = path.read_text(encoding="utf-8")
    header = text[: text.index("\nservice ")]
    assert {line["reason"] for line in _LINE.finditer(header)} == EVERYWHERE


def test_no_reason_is_missing() -> None:
    """Every failure that a caller can meet is named in a proto."""
    texts = "".join(path.read_text(encoding="utf-8") for path in PROTOS)
    named = {match["reason"] for match in (*_LINE.finditer(texts), *_MORE.finditer(texts))}
    assert set(FAULTS) - ELSEWHERE - named == set()
