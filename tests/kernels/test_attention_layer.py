"""The layers that attend, on every backend, against the one in plain torch."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inference_service.engine.backends.base import Attention, LayerHeads
from inference_service.engine.backends.native_attention import NativeAttention
from inference_service.engine.backends.operations import TorchAttention
from inference_service.engine.backends.triton import TritonAttention, TritonOperations
from inference_service.engine.kernels.attention import (
    AttentionCapacity,
    AttentionTables,
    Context,
    PagedAttention,
    pack_tables,
)
from inference_service.engine.kernels.cpu.ops import CpuOps
from inference_service.engine.layers.norm import RMSNorm
from inference_service.engine.layers.rope import Rope
from loramux_shared.bases.rope import AttentionSpec, HeadCounts, RopeSpec
from tests.support.native import open_native

COUNTS, BLOCK_SIZE = HeadCounts(6, 2, 24), 16
LARGE = HeadCounts(4, 1, 512)
CONTEXTS = [Context(0, 1, [5, 1, 3], 40), Context(1, 9, [2, 6], 20), Context(10, 1, [4], 1)]
ROWS, CACHE_ROWS = 11, 7 * BLOCK_SIZE
POSITIONS = torch.cat([torch.arange(c.end - c.length, c.end) for c in CONTEXTS])
Pair = tuple[Tensor, Tensor]


def _tables(counts: HeadCounts, device: torch.device) -> Mapping[HeadCounts, AttentionTables]:
    capacity = AttentionCapacity(ROWS, len(CONTEXTS), 4, BLOCK_SIZE, tile=4)
    tables = AttentionTables.allocate(capacity, device)
    tables.load(torch.from_numpy(pack_tables(capacity, CONTEXTS)))
    return {counts: tables}


def _attended(layer: Attention, counts: HeadCounts, cache: Pair, scales: Tensor) -> Pair:
    """Return the output of a layer that writes keys and values, and of one that reads those."""
    torch.manual_seed(3)
    place = cache[0].device
    rope = Rope(RopeSpec(counts.dim, 1e4), torch.float32, place)
    norm = RMSNorm(scales.to(place), 1e-5)
    own = torch.randn(ROWS, counts.queries + 2 * counts.kv, counts.dim).to(place)
    spec, rotation = AttentionSpec(counts.dim**-0.5), layer.prepare_rotation(*rope.at(POSITIONS.to(place)))
    first = layer(LayerHeads(own, rotation, *cache, spec, norm))
    queries = torch.randn(ROWS, counts.queries, counts.dim).to(place)
    held = [each.clone() for each in cache]
    of_queries = RMSNorm(norm.weight[: counts.queries], norm.eps)
    second = layer(LayerHeads(queries, rotation, *cache, replace(spec, keys_of=0), of_queries))
    assert all(torch.equal(now, then) for now, then in zip(cache, held, strict=True))
    return first.cpu(), second.cpu()


@pytest.mark.parametrize("counts", [COUNTS, LARGE], ids=str)
def test_a_layer_reads_what_another_wrote(counts: HeadCounts, native_folder: Path, device: str) -> None:
    """Queries alone, normed and turned, attend to keys and values of the step and before it, and write none."""
    built = open_native(native_folder)
    kv, dim = counts.kv, counts.dim
    plain = TorchAttention(PagedAttention(CONTEXTS, BLOCK_SIZE, torch.float32, torch.device("cpu")))
    compiled = TritonAttention(_tables(counts, torch.device(device)))
    layers: list[tuple[Attention, Pair]] = [
        (
            layer,
            (torch.zeros(kv, CACHE_ROWS, dim, device=place), torch.zeros(kv, CACHE_ROWS, dim, device=place)),
        )
        for layer, place in ((plain, "cpu"), (compiled, device))
    ]
    if built.library is not None:
        ops = CpuOps(built.library, torch.float32)
        layers.append((NativeAttention(ops, CONTEXTS, BLOCK_SIZE), ops.new_cache(kv, CACHE_ROWS, dim)))
    scales = torch.randn(counts.queries + 2 * kv, dim) + 1
    expected, *others = [_attended(layer, counts, cache, scales) for layer, cache in layers]
    for found in others:
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_layers_of_other_heads_have_tables_of_their_own(device: str) -> None:
    """Layers have separate tables where tile or kv heads differ, and else share the tables."""
    place, dtype = torch.device(device), torch.float16
    alike = HeadCounts(12, 2, 24), HeadCounts(12, 2, 48)
    operations = TritonOperations([COUNTS, LARGE, *alike], dtype, place)
    attention = operations.attention(CONTEXTS, BLOCK_SIZE, (None,))
    assert isinstance(attention, TritonAttention)
    found = {counts: tables for (counts, _), tables in attention.tables.items()}
    assert found[alike[0]].packed is found[alike[1]].packed
    assert len({id(tables.packed) for tables in found.values()}) == 3
    assert [found[counts].capacity.kv_heads for counts in (COUNTS, LARGE)] == [2, 1]
    for counts in found:
        heads = torch.randn(ROWS, counts.queries + 2 * counts.kv, counts.dim).to(place, dtype)
        keys, values = operations.new_cache(CACHE_ROWS, counts)
        rope = Rope(RopeSpec(counts.dim, 1e4), dtype, place)
        rotation = attention.prepare_rotation(*rope.at(POSITIONS.to(place)))
        out = attention(LayerHeads(heads, rotation, keys, values, AttentionSpec(1.0)))
        assert out.shape == (ROWS, counts.queries * counts.dim)
