"""Every shipped tile configuration of every kernel, through the real compiler; no GPU needed."""

import difflib

import pytest

from inference_service.engine.kernels.launch import ARCHITECTURES
from tests.golden.kernels import sources
from tests.golden.kernels.write import package_of, printed, recorded
from tests.kernels.aot import PACKAGES, Line, variants

PORTABLE_SHARED = 99 * 1024
"""Bytes that a program may have on every architecture from sm_80 on (163 KB on sm_80, 227 KB on sm_90)."""


def assert_equal(found: list[str], golden: list[str]) -> None:
    """Compare lines with the recorded ones."""
    changes = [*difflib.unified_diff(golden, found, "golden", "found", lineterm="", n=0)]
    assert not changes, "make golden, and read the diff:\n" + "\n".join(changes)


def assert_as_kept(found: list[Line]) -> None:
    names = {(line.name, line.dtype, line.architecture) for line in found}
    assert len(found) == len(names)
    golden = [str(line) for line in recorded() if (line.name, line.dtype, line.architecture) in names]
    assert_equal([*map(str, found)], golden)


def test_the_table_has_every_configuration_and_none_spills() -> None:
    """Every entry of the tuning tables is in the table of resources; no stack, and portable shared memory."""
    table = recorded()
    ships = {(v.name, v.dtype, architecture) for architecture in ARCHITECTURES for v in variants(architecture)}
    assert {(line.name, line.dtype, line.architecture) for line in table} == ships
    assert len(table) == len(ships)
    assert [str(line) for line in table if line.stack != 0 or line.shared > PORTABLE_SHARED] == []


@pytest.mark.timeout(900)
def test_the_table_is_of_these_kernels() -> None:
    """The recorded table is of this compiler and these sources; another compiler compiles every kernel."""
    golden, found = sources.RECORDED.read_text().splitlines(), sources.found()
    if golden[0] != found[0]:
        golden, found = [*map(str, recorded())], [*map(str, printed(PACKAGES))]
    assert_equal(found, golden)


@pytest.mark.timeout(900)
def test_promised_bits_are_those_of_exact_instructions() -> None:
    """Kernels whose results are torch's bit for bit divide exactly, and fuse no product with a sum."""
    found = [line.rpartition(": ") for line in sources.run("tests.kernels.exact")]
    assert {name.split()[0] for name, _, _ in found} == {"attention.rope_write", "sampling.shape"}
    assert [(name, instructions) for name, _, instructions in found if instructions != "exact"] == []


@pytest.mark.sweep
@pytest.mark.timeout(900)
@pytest.mark.parametrize("package", PACKAGES)
def test_every_configuration_takes_what_the_table_says(package: str) -> None:
    """Every configuration compiles to the recorded resources, whether or not its sources changed."""
    found = printed([package])
    assert len(found) == sum(package_of(line) == package for line in recorded())
    assert_as_kept(found)
