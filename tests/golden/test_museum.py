"""Hostile, broken and odd adapters, each judged by the whole pipeline, and manifests byte for byte."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from builder_service.domain import config_fields
from builder_service.pipeline.build import build
from builder_service.pipeline.progress import Progress
from loramux_shared.codes import CODES, Subject
from loramux_shared.faults import AdapterInvalid, Finding
from loramux_shared.storage.memory import MemoryStore
from tests.golden.hostile.exhibit import BASE, Exhibit, base
from tests.golden.hostile.files import CANARY
from tests.golden.hostile.museum import EXHIBITS
from tests.golden.manifests.write import ADAPTERS, FOLDER, manifest
from tests.support.folders import context_of, deployment_of

LONGEST_FINDING = 2000
"""Characters: what a hostile file says is never repeated at length."""


@pytest.fixture(scope="module", autouse=True)
def _hasty() -> Iterator[None]:
    """Patterns that would take for ever are given up sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_fields, "BOUNDS", replace(config_fields.BOUNDS, cpu_s=0.2))
        yield


def judge(exhibit: Exhibit, folder: Path) -> tuple[list[Finding], MemoryStore]:
    """Build an exhibit through the whole pipeline; returns the findings and the published generation."""
    base(folder / BASE, exhibit.base)
    exhibit.make(folder / "exhibit")
    required = deployment_of(
        folder, "exhibit", lora_configuration=exhibit.lora, signed_by=list(exhibit.signed_by)
    )
    store, progress = MemoryStore(), Progress(["exhibit"])
    try:
        build(required, context_of(folder, store), progress)
    except AdapterInvalid as refusal:
        return list(refusal.findings), store
    return list(progress.adapters[0].warnings), store


@pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: exhibit.name.replace(" ", "-"))
def test_every_exhibit_gets_its_codes_and_no_others(tmp_path: Path, exhibit: Exhibit) -> None:
    """A hostile, broken or odd adapter is refused or warned about by name, in few words."""
    findings, store = judge(exhibit, tmp_path)
    assert sorted(finding.code for finding in findings) == sorted(exhibit.codes)
    assert bool(store.objects) != exhibit.refused
    assert max((len(str(finding)) for finding in findings), default=0) < LONGEST_FINDING
    assert not (tmp_path / "exhibit" / CANARY).exists()


def test_every_code_about_adapters_has_an_exhibit() -> None:
    """Every code that refuses or warns is the only one of some exhibit; those of npy files are elsewhere."""
    about = {code for code in CODES if CODES[code].subject in (Subject.REFUSED, Subject.WARNED)}
    alone = {code for exhibit in EXHIBITS for code in exhibit.codes if len(exhibit.codes) == 1}
    assert about - alone == {"E_BAD_NPY", "W_GATE_UP"}


@pytest.mark.parametrize("name", ADAPTERS)
def test_manifests_are_the_same_on_every_machine(name):
    """The same adapter and settings give the same manifest, digests and norms included, byte for byte."""
    assert manifest(name) == (FOLDER / f"{name}.json").read_bytes()
