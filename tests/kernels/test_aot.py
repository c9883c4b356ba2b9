"""Every shipped tile configuration of every kernel, through the real compiler; no GPU needed."""

from __future__ import annotations

import difflib
from itertools import combinations, product

import pytest

from inference_service.kernels.launch import ARCHITECTURES
from tests.golden.kernels.write import kept, package_of, printed
from tests.kernels.aot import PACKAGES, Variant, covering, variants

PORTABLE_SHARED = 99 * 1024
"""Bytes that a program may have on every architecture from sm_80 on (163 KB on sm_80, 227 KB on sm_90)."""

USUAL, SELDOM = ARCHITECTURES[:2], ARCHITECTURES[2:]
"""Those of every run, and those of a sweep."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("architectures", [USUAL, pytest.param(SELDOM, marks=pytest.mark.sweep)], ids=str)
def test_configurations_take_what_the_table_says_and_none_spills(
    package: str, architectures: tuple[int, ...]
) -> None:
    """Every entry has no stack and portable shared memory; what it takes is known (else: make golden)."""
    found = printed([package], architectures)
    names = {
        (v.name, v.dtype, architecture)
        for architecture in architectures
        for v in variants(architecture, [package])
    }
    assert {(line.name, line.dtype, line.architecture) for line in found} == names
    assert len(found) == len(names)
    assert [str(line) for line in found if line.stack != 0 or line.shared > PORTABLE_SHARED] == []

    golden = [
        str(line) for line in kept() if package_of(line) == package and line.architecture in architectures
    ]
    changes = list(difflib.unified_diff(golden, [*map(str, found)], "golden", "compiled", lineterm="", n=0))
    assert not changes, "make golden, and read the diff:\n" + "\n".join(changes)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_type_that_is_served_is_compiled(package: str) -> None:
    """No kernel is left out for fp16, whose registers nobody would look at; some have own types alone."""
    served = {"bf16", "fp16", "fp32"}
    every = [variant for architecture in ARCHITECTURES for variant in variants(architecture, [package])]
    every = [variant for variant in every if _takes_the_models_type(variant)]
    kernels = {variant.kernel: {v.dtype for v in every if v.kernel is variant.kernel} for variant in every}
    assert all(dtypes == served for dtypes in kernels.values())


def _takes_the_models_type(variant: Variant) -> bool:
    pointers = (name for name in variant.kernel.arg_names if name.startswith("p_"))
    return any(name not in variant.types and name not in variant.constants for name in pointers)


def test_what_two_choices_allow_meets_in_few_combinations() -> None:
    """Every two values meet, and so does what was asked for; all combinations are many more."""
    choices = {"a": (1, 2, 3), "b": (1, 2, 3), "c": (True, False), "d": (True, False)}
    rows = covering(choices, lambda row: row["a"] + row["b"] + row["c"])
    for first, second in combinations(choices, 2):
        met = {(row[first], row[second]) for row in rows}
        assert met == set(product(choices[first], choices[second]))
    assert {row["a"] + row["b"] + row["c"] for row in rows} == set(range(2, 8))
    assert len(rows) <= 12


@pytest.mark.sweep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_layer_spills_in_attention(architecture: int) -> None:
    """Heads, groups, windows, caps and types in all combinations; the table holds every two of them."""
    found = printed(["attention_sweep"], [architecture])
    assert [str(line) for line in found if line.stack != 0 or line.shared > PORTABLE_SHARED] == []


@pytest.mark.sweep
@pytest.mark.timeout(1800)
def test_no_number_of_planes_or_slices_spills() -> None:
    """SGMV's kernels are specialised for the planes and slices that they have: the table holds the most."""
    assert [str(line) for line in printed(["sgmv_sweep"]) if line.stack != 0] == []
