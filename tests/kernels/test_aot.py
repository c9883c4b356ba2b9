"""Every shipped tile configuration of every kernel, through the real compiler; no GPU needed."""

from __future__ import annotations

import difflib

import pytest

from inference_service.kernels.launch import ARCHITECTURES
from tests.golden.kernels.write import kept, package_of, printed
from tests.kernels.aot import PACKAGES, variants

PORTABLE_SHARED = 99 * 1024
"""Bytes that a program may have on every architecture from sm_80 on (163 KB on sm_80, 227 KB on sm_90)."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("package", PACKAGES)
def test_configurations_take_what_the_table_says_and_none_spills(package: str, architecture: int) -> None:
    """Every entry has no stack and portable shared memory; what it takes is known (else: make golden)."""
    found = printed([package], [architecture])
    names = {(variant.name, variant.dtype) for variant in variants(architecture, [package])}
    assert {(line.name, line.dtype) for line in found} == names
    assert len(found) == len(names)
    assert [str(line) for line in found if line.stack != 0 or line.shared > PORTABLE_SHARED] == []

    golden = [str(line) for line in kept() if package_of(line) == package and line.architecture == architecture]
    changes = list(difflib.unified_diff(golden, [*map(str, found)], "golden", "compiled", lineterm="", n=0))
    assert not changes, "make golden, and read the diff:\n" + "\n".join(changes)


@pytest.mark.sweep
@pytest.mark.timeout(1800)
def test_no_number_of_planes_or_slices_spills() -> None:
    """SGMV's kernels are specialised for the planes and slices that they have: the table holds the most."""
    assert [str(line) for line in printed(["sgmv_sweep"]) if line.stack != 0] == []
