"""Fresh random inputs for attention, in a cache that is NaN where no kernel may look."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from inference_service.engine.kernels import attention
from inference_service.engine.kernels.launch import Launch, planned
from loramux_shared.bases.rope import AttentionSpec

TOLERANCE = {torch.float32: 3e-6, torch.float16: 6e-3, torch.bfloat16: 8e-2}
"""Largest relative error of one head of one row; the interpreter truncates to bf16."""
WRITTEN = ("p_q", "p_out", "p_partial", "p_lse")


@dataclass(frozen=True)
class Layout:
    """The chunks of a step: (rows, context) of each, and what the tables have room for."""

    chunks: Sequence[tuple[int, int]]
    block_size: int = 16
    padding: int = 0
    """Rows of the step that belong to no chunk, one behind each chunk and the rest behind all."""
    spare: int = 0
    """Chunks that the tables have room for beyond those, and blocks per chunk."""
    decode_only: bool = False

    def contexts(self, blocks: int) -> list[attention.Context]:
        """The chunks, with their blocks scattered over the cache's."""
        order, row, contexts = iter(torch.randperm(blocks).tolist()), 0, []
        for index, (length, end) in enumerate(self.chunks):
            contexts.append(attention.Context(row, length, [next(order) for _ in range(self.needed(end))], end))
            row += length + (index < self.padding)
        return contexts

    def needed(self, end: int) -> int:
        return -(-end // self.block_size)


@dataclass(frozen=True)
class Heads:
    """A layer's heads."""

    queries: int = 6
    kv: int = 2
    dim: int = 16
    rotary: int | None = None
    """All dimensions by default."""
    norm: str | None = None
    """`shared` or `own`: one weight, or one per head."""
    offset: float = 0.0


@dataclass
class Case:
    """Arguments of ``attend``, and what is right."""

    inputs: attention.Inputs
    tables: attention.AttentionTables
    contexts: list[attention.Context]
    spec: AttentionSpec
    norm: attention.HeadNorm | None
    layout: Layout
    sinks: Tensor | None = None

    def planned(self) -> tuple[Tensor, list[Launch]]:
        """The launches, with NaN in everything that they write but the cache."""
        out, launches = planned(attention.attend, self.inputs, self.tables, self.spec, self.norm, self.sinks)
        poison(launches)
        return out, launches

    def run(self) -> Tensor:
        """Launch all kernels: [T, query heads, d]."""
        out, launches = self.planned()
        for launch in launches:
            launch()
        return out

    @cached_property
    def expected_qk(self) -> Tensor:
        """fp64 [T, heads of queries and keys, d]: normed and rotated."""
        at = self.inputs
        x = at.heads[:, : at.num_heads + at.kv_heads].double()
        if self.norm is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.norm.eps)
            x = x * (self.norm.weight.double() + self.norm.offset)
        half = at.rotary // 2
        low, high = x[..., :half], x[..., half : at.rotary]
        turned = torch.cat([high, low], dim=-1) * at.sin[:, None].double()
        return torch.cat([x[..., : at.rotary] * at.cos[:, None].double() + turned, x[..., at.rotary :]], dim=-1)

    def cache_rows(self, context: attention.Context) -> Tensor:
        """[end]: where the positions of a context are."""
        blocks = torch.tensor(list(context.blocks))
        rows = blocks[:, None] * self.layout.block_size + torch.arange(self.layout.block_size)
        return rows.flatten()[: context.end]

    def first_seen(self, context: attention.Context) -> int:
        """The first position that any row of a chunk sees."""
        window = self.spec.window
        return 0 if window is None else max(0, context.end - context.length + 1 - window)

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        """Return the values of the cache, in fp64 [kv heads, cache rows, d]."""
        at = self.inputs
        every = torch.arange(at.keys.shape[1], device=at.keys.device)
        return attention.KeysValues(at.keys, at.values, at.scales).read(every, torch.float64)

    def expected(self, keys: Tensor, values: Tensor) -> Tensor:
        """fp64 [T, query heads, d] over the cache before the step, or after it for 8 bits; 0 where padded."""
        at, group = self.inputs, self.inputs.num_heads // self.inputs.kv_heads
        out = torch.zeros(len(at.heads), at.num_heads, at.head_dim, dtype=torch.float64, device=keys.device)
        for context in self.contexts:
            mine = slice(context.row, context.row + context.length)
            rows = self.cache_rows(context)[: context.end - context.length * (at.scales is None)]
            k, v = keys[:, rows].double(), values[:, rows].double()
            if at.scales is None:
                k = torch.cat([k, self.expected_qk[mine, at.num_heads :].transpose(0, 1)], 1)
                v = torch.cat([v, at.heads[mine, at.num_heads + at.kv_heads :].double().transpose(0, 1)], 1)
            positions = torch.arange(context.end, device=keys.device)
            own_at = positions[context.end - context.length :, None]
            seen = positions <= own_at
            if self.spec.window is not None:
                seen &= positions > own_at - self.spec.window
            q = self.expected_qk[mine, : at.num_heads].transpose(0, 1)
            s = q @ k.repeat_interleave(group, 0).transpose(1, 2) * self.spec.scale
            if self.spec.softcap is not None:
                s = self.spec.softcap * torch.tanh(s / self.spec.softcap)
            s = s.masked_fill(~seen, -torch.inf)
            if self.sinks is not None:
                s = torch.cat([s, self.sinks.double()[:, None, None].expand(-1, len(q[0]), 1)], dim=-1)
            weights = s.softmax(-1)[..., : context.end]
            # What no row sees is NaN in the cache, and 0 * NaN is NaN here too.
            out[mine] = (weights @ v.repeat_interleave(group, 0).nan_to_num()).transpose(0, 1)
        return out


def make_case(
    layout: Layout,
    heads: Heads = Heads(),
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    cache: torch.dtype | None = None,
) -> Case:
    """Random heads and histories; all else in the cache, whose type may be another, and all padding is NaN."""
    torch.manual_seed(sum(end for _, end in layout.chunks) * 100 + heads.dim)
    group = heads.queries // heads.kv
    capacity = attention.AttentionCapacity(
        rows=sum(length for length, _ in layout.chunks) + layout.padding,
        chunks=len(layout.chunks) + layout.spare,
        blocks_per_chunk=max(layout.needed(end) for _, end in layout.chunks) + layout.spare,
        block_size=layout.block_size,
        tile=None
        if layout.decode_only
        else attention.prefill_tile(torch.device(device), dtype, heads.dim, group),
        kv_heads=heads.kv,
    )
    blocks = capacity.chunks * capacity.blocks_per_chunk + 1
    contexts = layout.contexts(blocks)
    tables = attention.AttentionTables.allocate(capacity, device)
    tables.load(torch.from_numpy(attention.pack_tables(capacity, contexts)))
    spec = AttentionSpec(heads.dim**-0.5, window, softcap)
    inputs = _inputs(capacity.rows, blocks * layout.block_size, heads, dtype, device, cache)
    beside = (torch.randn(heads.queries) * 3).to(device) if sinks else None
    case = Case(inputs, tables, contexts, spec, _norm(heads, dtype, device), layout, beside)
    fill(case)
    return case


def fill(case: Case) -> None:
    """Fill the rows of chunks and their visible past with random values, everything else with NaN."""
    at = case.inputs
    held = attention.KeysValues(at.keys, at.values, at.scales)
    at.heads.fill_(torch.nan)
    for poisoned in held.tensors:
        if poisoned.itemsize == 1:
            poisoned.view(torch.int8).fill_(127)  # NaN of float8, and times a scale that is NaN
        else:
            poisoned.fill_(torch.nan)
    for context in case.contexts:
        mine = at.heads[context.row : context.row + context.length]
        mine.copy_(torch.randn(mine.shape))
        past = case.cache_rows(context)[case.first_seen(context) : context.end - context.length]
        k, v = (torch.randn(len(past), at.kv_heads, at.head_dim) for _ in range(2))
        held.write(past.to(at.keys.device), *(part.to(at.heads) for part in (k, v)))


def poison(launches: Sequence[Launch]) -> None:
    """Fill everything that launches write, but for the cache, with NaN."""
    for launch in launches:
        for name in WRITTEN:
            if launch.arguments.get(name) is not None:
                launch.arguments[name].fill_(torch.nan)


def reloaded(case: Case, layout: Layout) -> Case:
    """The same tensors with another content, as before the next step."""
    contexts = layout.contexts(case.inputs.keys.shape[1] // layout.block_size)
    case.tables.load(torch.from_numpy(attention.pack_tables(case.tables.capacity, contexts)))
    other = Case(case.inputs, case.tables, contexts, case.spec, case.norm, layout, case.sinks)
    fill(other)
    return other


def expect_right(case: Case, run: Callable[[], Tensor] | None = None) -> None:
    """Run a case, and compare its results and its cache with fp64."""
    at, tolerance = case.inputs, TOLERANCE[case.inputs.heads.dtype]
    keys, values = at.keys.clone(), at.values.clone()
    got = (run or case.run)()
    assert errors(got, case.expected(keys, values)).max() <= tolerance
    for context in case.contexts:
        rows = case.cache_rows(context)[context.end - context.length :]
        mine = slice(context.row, context.row + context.length)
        written = case.expected_qk[mine, at.num_heads :].transpose(0, 1)
        assert errors(at.keys[:, rows], written).max() <= tolerance
        own = at.heads[mine, at.num_heads + at.kv_heads :].transpose(0, 1)
        assert torch.equal(at.values[:, rows], own)
        keys[:, rows], values[:, rows] = at.keys[:, rows], own
    assert torch.equal(at.keys.nan_to_num(), keys.nan_to_num())
    assert torch.equal(at.values.nan_to_num(), values.nan_to_num())


def errors(got: Tensor, expected: Tensor) -> Tensor:
    """[...]: the relative error of every head of every row; where 0 is expected, the norm of the result."""
    error, size = (got.double() - expected).norm(dim=-1), expected.norm(dim=-1)
    return torch.where(size > 0, error / size, error).nan_to_num(nan=torch.inf)


def _inputs(
    rows: int, cache_rows: int, heads: Heads, dtype: torch.dtype, device: str, kept: torch.dtype | None
) -> attention.Inputs:
    rotary = heads.dim if heads.rotary is None else heads.rotary
    angles = torch.rand(rows, rotary // 2) * 6
    cos, sin = torch.cat([angles.cos()] * 2, dim=1), torch.cat([-angles.sin(), angles.sin()], dim=1)
    cache = attention.KeysValues.allocate(heads.kv, cache_rows, heads.dim, kept or dtype, torch.device(device))
    fused = torch.empty(rows, heads.queries + 2 * heads.kv, heads.dim)
    fused, cos, sin = (part.to(device, dtype) for part in (fused, cos, sin))
    return attention.Inputs(fused, cos, sin, cache.keys, cache.values, scales=cache.scales)


def _norm(heads: Heads, dtype: torch.dtype, device: str) -> attention.HeadNorm | None:
    if heads.norm is None:
        return None
    shape = (heads.dim,) if heads.norm == "shared" else (heads.queries + heads.kv, heads.dim)
    return attention.HeadNorm((torch.randn(shape) + 1 - heads.offset).to(device, dtype), 1e-5, heads.offset)
