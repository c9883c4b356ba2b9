from __future__ import annotations

import re
from pathlib import Path

from loramux_shared.codes import CODES, CURES
from loramux_shared.faults import FAULTS
from scripts import docs, errors_doc
from tests.support.root import ROOT

PACKAGES = ("shared/loramux_shared", "builder_service", "loramux", "inference_service")


def codes_in(path: Path) -> list[str]:
    """The strings of a module that are codes."""
    return re.findall(r'"([EW]_[A-Z0-9]+(?:_[A-Z0-9]+)*)"', path.read_text(encoding="utf-8"))


def test_every_code_that_is_used_has_a_page_entry_and_the_reverse():
    """A code without an explanation and an explanation without a code are both mistakes."""
    of_npy_files = {"E_BAD_NPY", "W_GATE_UP"}  # which an extension reads
    used = {
        code
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "codes.py" and "v1" not in path.parts
        for code in codes_in(path)
    }
    assert used | of_npy_files == set(CODES)


def test_every_reason_has_a_cure_and_the_reverse():
    """Every fault has a cure."""
    assert set(CURES) == set(FAULTS)


def test_the_page_is_what_the_codes_say():
    """docs/reference/errors.md is generated, and names every code and every reason."""
    page = errors_doc.page()
    assert (docs.DOCS / "reference" / "errors.md").read_text() == page
    assert all(f"- `{name}`: " in page for name in (*CODES, *FAULTS))
