from __future__ import annotations

import time
from pathlib import Path

import pytest

from builder_service.pipeline.build import build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress
from loramux_shared.codes import CODES, Subject
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.faults import AdapterInvalid, Finding
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.golden.hostile.exhibit import BASE, Exhibit, base
from tests.golden.hostile.files import CANARY
from tests.golden.hostile.museum import EXHIBITS

LONGEST_S = 60
"""For one exhibit on a slow machine; nearly all take a few milliseconds."""
LONGEST_FINDING = 2000
"""Characters: what a hostile file says is never repeated at length."""


def judge(exhibit: Exhibit, folder: Path) -> tuple[list[Finding], MemoryStore]:
    """Build an exhibit through the whole pipeline; returns what was found and what was published."""
    base(folder / BASE, exhibit.base)
    exhibit.make(folder / "exhibit")
    data = {
        "model_name": "museum",
        "build": {
            "checkpoint_repository": {"source": "LOCAL", "repo": str(folder / BASE)},
            "lora_adapters": {"exhibit": {"source": "LOCAL", "repo": str(folder / "exhibit")}},
            "lora_configuration": exhibit.lora,
            "signed_by": exhibit.signed_by,
        },
    }
    store = MemoryStore()
    context = BuildContext(store, open_sources(local_roots=[folder]), folder / "work")
    progress = Progress(["exhibit"])
    try:
        build(parse_deployment(data).deployment, context, progress)
    except AdapterInvalid as refusal:
        return list(refusal.findings), store
    return list(progress.adapters[0].warnings), store


@pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: exhibit.name.replace(" ", "-"))
def test_every_exhibit_gets_its_codes_and_no_others(tmp_path, exhibit):
    """A hostile, broken or odd adapter is refused or warned about by name, in time and in few words."""
    begin = time.monotonic()
    findings, store = judge(exhibit, tmp_path)
    assert sorted(finding.code for finding in findings) == sorted(exhibit.codes)
    assert bool(store.objects) != exhibit.refused
    assert max((len(str(finding)) for finding in findings), default=0) < LONGEST_FINDING
    assert time.monotonic() - begin < LONGEST_S
    assert not (tmp_path / "exhibit" / CANARY).exists()


@pytest.mark.parametrize(
    "code", [code for code in CODES if CODES[code].subject in (Subject.REFUSED, Subject.WARNED)]
)
def test_every_code_about_adapters_has_an_exhibit(code):
    """A code that no exhibit gets is one that nobody has seen."""
    assert any(code in exhibit.codes for exhibit in EXHIBITS)
    assert any(
        exhibit.codes == {code} or code in {"W_GATE_UP"} for exhibit in EXHIBITS if code in exhibit.codes
    )


def test_exhibits_have_names_of_their_own():
    """Two exhibits of one name would hide one another in a report."""
    names = [exhibit.name for exhibit in EXHIBITS]
    assert sorted(set(names)) == sorted(names)
