"""Mutated npy files of a TensorRT-LLM converter: taken as numpy reads them, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from builder_service.domain.rules.adapter import CheckedAdapter, Rulebook, check_tensors
from loramux_npy.reading import FOLDED, NpyAdapter, read_npy_adapter
from loramux_shared.codes import CODES
from tests.fuzz.mutate import NUMBERS, bounded, mutations
from tests.npy_files import SIZES, matrices
from tests.unit.domain.test_adapter_rules import book

WEIGHTS, CONFIG = "model.lora_weights.npy", "model.lora_config.npy"
ROWS = ((0, 0, 2), (1, 1, 4), (5, 1, 3), (18, 0, 2))


def written(folder: Path, rng: Random) -> None:
    """Write both files: as a converter does, or with numbers of the table or of the headers changed."""
    rows = rng.sample(ROWS, rng.randint(1, len(ROWS)))
    flat = [np.concatenate([part.ravel() for part in matrices(*row)]) for row in rows]
    width = max(map(len, flat)) + rng.choice((0, 3, sum(SIZES[1])))
    weights = np.stack([np.pad(row, (0, width - len(row))) for row in flat])
    table = np.array([[*row, 0] for row in rows], np.int64)
    if rng.random() < 0.5:
        at = rng.randrange(len(rows)), rng.randrange(4)
        table[at] = rng.choice((-1, 0, 1, 2, 3, 5, 9, 13, 77, 2**31 - 1, -(2**31)))
    np.save(folder / WEIGHTS, weights.astype(rng.choice(("<f2", "<f4"))))
    np.save(folder / CONFIG, table.astype(np.int32))
    if rng.random() < 0.7:
        path = folder / rng.choice((WEIGHTS, CONFIG))
        data = path.read_bytes()
        path.write_bytes(_renumbered(data, rng) if rng.random() < 0.3 else mutations(data, rng))


def _renumbered(data: bytes, rng: Random) -> bytes:
    """Return a file whose header has another shape, of the same length where that is possible."""
    begin = data.index(b"'shape': (") + len("'shape': (")
    end = data.index(b")", begin)
    sizes = [str(rng.choice((*NUMBERS, 1, 2, 4))) for _ in range(rng.choice((1, 2, 2, 3)))]
    text = ", ".join(sizes).encode()
    room = end - begin + 8
    return (
        data[:begin] + text + data[end : end + 4] + data[end + 4 + max(0, min(len(text), room) - end + begin) :]
    )


def checked(folder: Path, rules: Rulebook) -> tuple[NpyAdapter, CheckedAdapter | None]:
    """Read a folder, and check the result."""
    npy = read_npy_adapter(folder, rules.limits.base)
    if npy.file is None:
        return npy, None
    return npy, check_tensors(npy.file, FOLDED, rules, list(npy.findings), lambda _: None)


def same_numbers(folder: Path, npy: NpyAdapter) -> bool:
    """True when every tensor is where numpy sees it."""
    weights: Any = np.load(folder / WEIGHTS, allow_pickle=False)
    raw = weights.reshape(-1, weights.shape[-1]).view(np.uint8)
    assert npy.file is not None
    start = (folder / WEIGHTS).stat().st_size - raw.size
    flat = raw.reshape(-1)
    for tensor in npy.file.tensors.values():
        begin = tensor.offset - start
        if npy.file.read(tensor.name).tobytes() != flat[begin : begin + tensor.size].tobytes():
            return False
    return True


RUNS = [
    pytest.param(range(100), id="short"),
    pytest.param(range(10_000, 30_000), marks=(pytest.mark.sweep, pytest.mark.timeout(3600)), id="long"),
]


def fuzz(folder: Path, cases: range) -> None:
    """Check so many mutations, each from a seed of its own."""
    rules = book()
    with bounded() as watch:
        for case in cases:
            written(folder, Random(case))
            with watch.case(f"seed {case}"):
                npy, whole = checked(folder, rules)
            findings = npy.findings if whole is None else whole.findings
            assert {finding.code for finding in findings} <= CODES.keys(), case
            assert max((len(str(finding)) for finding in findings), default=0) < 2000, case
            json.dumps([finding.model_dump() for finding in findings], ensure_ascii=False).encode()
            refused = any(finding.code.startswith("E_") for finding in findings)
            assert refused == (whole is None or not whole.rows), case
            watch.note("refused" if refused else "accepted")
            if not refused:
                assert same_numbers(folder, npy), case


@pytest.mark.parametrize("cases", RUNS)
def test_mutated_files_are_taken_or_refused_by_name(tmp_path: Path, cases: range) -> None:
    """A file that is accepted has the numbers that numpy reads; one that is refused has a code."""
    fuzz(tmp_path, cases)
