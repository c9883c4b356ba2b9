"""Tensors of low-bit weights, changed at random: widened to the shape that is meant, or refused by name."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from loramux_shared.faults import CheckpointInvalid
from tests.models.test_formats import checkpoint
from tests.support.examples import examples
from tests.support.lowbit import KINDS

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
