"""The layer that launches attention's kernels, against the one in plain torch."""

from __future__ import annotations

import pytest
import torch

from inference_service.backends.base import Attention
from inference_service.backends.torch import TorchAttention
from inference_service.backends.triton import TritonAttention
from inference_service.kernels.attention import (
    AttentionCapacity,
    AttentionTables,
    Context,
    PagedAttention,
    pack_tables,
)
from inference_service.layers.norm import RMSNorm
from inference_service.layers.rope import Rope
from loramux_shared.bases.attention import AttentionSpec
from loramux_shared.bases.rope import RopeSpec

HEADS, KV, DIM, BLOCK_SIZE = 6, 2, 24, 16
CONTEXTS = [Context(0, 1, [5, 1, 3], 40), Context(1, 9, [2, 0], 20), Context(10, 1, [4], 1)]
ROWS, CACHE_ROWS = 11, 6 * BLOCK_SIZE


def _norms(dtype: torch.dtype, device: str) -> dict[str, RMSNorm | None]:
    weight = (torch.randn(HEADS + KV, DIM) + 1).to(device, dtype)
    return {"none": None, "of heads": RMSNorm(weight, 1e-5), "with an offset": RMSNorm(weight, 1e-5, 1.0)}


@pytest.mark.parametrize(
    ("norm", "cap", "sunk"),
    [("none", 8.0, True), ("of heads", 8.0, False), ("with an offset", 8.0, False), ("none", None, True)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_layer_gives_what_the_torch_layer_gives(
    norm: str, cap: float | None, sunk: bool, dtype: torch.dtype, device: str
) -> None:
    """Keys are rounded where torch rounds them: to the same bits in float16 (bf16 is truncated here)."""
    torch.manual_seed(7)
    place = torch.device(device)
    heads = torch.randn(ROWS, HEADS + 2 * KV, DIM).to(place, dtype)
    cache = torch.randn(2, KV, CACHE_ROWS, DIM).to(place, dtype)
    positions = torch.cat([torch.arange(c.end - c.length, c.end) for c in CONTEXTS]).to(place)
    rope = Rope(RopeSpec(DIM - 8, 1e4), dtype, place)
    spec = AttentionSpec(DIM**-0.5, window=30, softcap=cap)
    capacity = AttentionCapacity(ROWS, len(CONTEXTS), 4, BLOCK_SIZE, tile=8)
    tables = AttentionTables.allocate(capacity, place)
    tables.load(torch.from_numpy(pack_tables(capacity, CONTEXTS)))
    paged = PagedAttention(CONTEXTS, BLOCK_SIZE, HEADS // KV, dtype, place, (spec.window,))
    layers: list[Attention] = [TorchAttention(paged, HEADS, KV), TritonAttention(tables, (spec.window,))]
    norms = _norms(dtype, device)
    sinks = torch.randn(HEADS).to(place) if sunk else None
    caches, outs = [cache.clone() for _ in layers], []
    for layer, (keys, values) in zip(layers, caches, strict=True):
        turn = layer.turn(*rope.at(positions))
        outs.append(layer(heads.clone(), turn, keys, values, spec, norms[norm], sinks))

    exact = {"rtol": 0, "atol": 0} if dtype is torch.float16 else {"rtol": 1e-5, "atol": 1e-6}
    if (
        dtype is torch.float16 and place.type == "cuda"
    ):  # sums have another order there: one may round otherwise
        exact = {"rtol": torch.finfo(dtype).eps, "atol": torch.finfo(dtype).tiny}
    torch.testing.assert_close(caches[1], caches[0], **exact)
    tolerance = 3e-3 if dtype is torch.float16 else 1e-5
    assert outs[1].shape == (ROWS, HEADS * DIM)
    assert (outs[1] - outs[0]).norm() <= tolerance * outs[0].norm()
