"""Mutated safetensors files: accepted as they are meant, or refused by name."""

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import safetensors
from safetensors.numpy import save

from builder_service.domain.rules.adapter import check_adapter
from builder_service.domain.safetensors_header import HeaderInvalid, TensorFile, read_header
from loramux_shared.codes import CODES
from tests.fuzz.mutate import bounded, json_text, mutated_json, mutations, runs
from tests.support.adapters import tensors, write_adapter
from tests.unit.domain.test_adapter_rules import book

SEEDS: tuple[dict[str, Any], ...] = (
    tensors(),
    {name: value.astype(np.float32) for name, value in tensors(("q_proj", "o_proj", "down_proj")).items()},
    {"a": np.zeros((0, 3), np.float16), "b": np.ones((), np.int64), "": np.ones(5, np.uint8)},
)
METADATA = {"format": "pt"}  # the library writes several in any order


def mutated(rng: Random) -> bytes:
    """Return a changed file, in its bytes or in its header."""
    data = save(rng.choice(SEEDS), METADATA)
    if rng.random() < 0.4:
        return mutations(data, rng)
    length = int.from_bytes(data[:8], "little")
    header = mutated_json(json.loads(data[8 : 8 + length]), rng)
    text = json_text(header, rng)
    claimed = len(text) if rng.random() < 0.9 else rng.choice((0, 1, 2**31, 2**63, len(text) + 1))
    return struct.pack("<Q", claimed) + text + data[8 + length :]


def opened(path: Path) -> TensorFile | None:
    """Read a header; None where it is refused."""
    try:
        return read_header(path)
    except HeaderInvalid:
        return None


@pytest.mark.parametrize("cases", runs(300))
def test_mutated_files_are_read_as_the_library_reads_them(tmp_path: Path, cases: range) -> None:
    """A file that is accepted is accepted by the library too; one that is refused has a code."""
    write_adapter(tmp_path)
    path, rules = tmp_path / "adapter_model.safetensors", book()
    with bounded() as watch:
        for case in cases:
            data = mutated(Random(case))
            path.write_bytes(data)
            with watch.case(f"seed {case}"):
                file = opened(path)
                codes = {finding.code for finding in check_adapter(tmp_path, rules).findings}
            assert codes <= CODES.keys()
            assert (file is None) == (codes == {"E_BAD_WEIGHTS"}), case
            watch.note("refused" if file is None else "accepted")
            if file is not None:  # then the library does, and reads the same
                theirs = {name: tuple(info["shape"]) for name, info in safetensors.deserialize(data)}
                assert theirs == {name: tensor.shape for name, tensor in file.tensors.items()}, case
