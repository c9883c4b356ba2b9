"""Mutated safetensors files and low-bit tensors: accepted as they are meant, or refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.numpy import save
from torch import Tensor

from builder_service.domain.rules.adapter import check_adapter
from builder_service.domain.safetensors_header import HeaderInvalid, TensorFile, read_header
from loramux_shared.codes import CODES
from loramux_shared.faults import CheckpointInvalid
from tests.fuzz.mutate import bounded, json_text, mutated_json, mutations
from tests.models.test_formats import checkpoint
from tests.support.adapters import tensors, write_adapter
from tests.support.examples import examples
from tests.support.lowbit import KINDS
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


RUNS = [
    pytest.param(range(300), id="short"),
    pytest.param(range(10_000, 30_000), marks=(pytest.mark.sweep, pytest.mark.timeout(3600)), id="long"),
]


def fuzz(folder: Path, cases: range) -> None:
    """Check so many mutations, each from a seed of its own."""
    write_adapter(folder)
    path, rules = folder / "adapter_model.safetensors", book()
    with bounded() as watch:
        for case in cases:
            data = mutated(Random(case))
            path.write_bytes(data)
            with watch.case(f"seed {case}"):
                file = opened(path)
                codes = {finding.code for finding in check_adapter(folder, rules).findings}
            assert codes <= CODES.keys()
            assert (file is None) == (codes == {"E_BAD_WEIGHTS"}), case
            watch.note("refused" if file is None else "accepted")
            if file is not None:  # then the library does, and reads the same
                theirs = {name: tuple(info["shape"]) for name, info in safetensors.deserialize(data)}
                assert theirs == {name: tensor.shape for name, tensor in file.tensors.items()}, case


@pytest.mark.parametrize("cases", RUNS)
def test_mutated_files_are_read_as_the_library_reads_them(tmp_path: Path, cases: range) -> None:
    """A file that is accepted is accepted by the library too; one that is refused has a code."""
    fuzz(tmp_path, cases)


TYPES = (torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64)
SIZES = (0, 1, 2, 5, 48, 80)
BESIDE = ("_x", ".y", "_scale", "_scale_inv", "_zero_point", "_g_idx", "_packed")


def changed(tensors: dict[str, Tensor], rng: Random) -> None:
    """Take a tensor away, or give it another type, other bytes, another shape, or one more beside it."""
    role = rng.choice(sorted(tensors))
    value = tensors[role]
    data = value.contiguous().flatten().view(torch.uint8)
    sizes = [rng.choice(SIZES) for _ in range(rng.randrange(4))]
    match rng.randrange(6):
        case 0:
            del tensors[role]
        case 1:
            tensors[role] = data if value.dtype == torch.float8_e4m3fn else value.to(rng.choice(TYPES))
        case 2:
            drawn = torch.tensor([rng.randrange(256) for _ in range(64)], dtype=torch.uint8)
            tensors[role] = drawn.repeat(len(data) // 64 + 1)[: len(data)].view(value.dtype).view(value.shape)
        case 3:
            tensors[role] = value.flatten()[: rng.randrange(6)].clone()
        case 4:
            tensors[role] = value.new_zeros(sizes)
        case _:
            tensors["weight" + rng.choice(BESIDE)] = torch.zeros(sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensors_are_worse_than_refused(tmp_path: Path, kind: str) -> None:
    """Mutated tensors give the right shape or the named error."""
    whole, _ = KINDS[kind].keep(torch.randn(48, 80, generator=torch.Generator().manual_seed(0)))
    refused, rng = 0, Random(kind)
    for _ in range(examples(40)):
        tensors = dict(whole)
        for _ in range(rng.choice((1, 1, 2))):
            if tensors:
                changed(tensors, rng)
        named = {f"layer.{role}": tensor for role, tensor in tensors.items()} | {"other": torch.zeros(1)}
        try:
            found = checkpoint(tmp_path, named, KINDS[kind].config, torch.float32).get("layer.weight", (48, 80))
            assert found.shape == (48, 80)
        except CheckpointInvalid:
            refused += 1
    assert refused
