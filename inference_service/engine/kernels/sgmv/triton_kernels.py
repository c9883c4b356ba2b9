"""The two kernels, and how others add what expand would.

T tokens, P entries, S segments, K in, N out, R rows of A of one slot over all slices."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# The bodies are Triton, not Python: only the compiler knows their types.

import triton
import triton.language as tl

ROW = tl.constexpr(16)
"""Value of `layout.ROW`: rows of A begin at multiples."""
FIELDS = tl.constexpr(4)
"""As `layout.FIELDS`."""
SCAN = tl.constexpr(64)
"""Segments that a program of shrink looks at together."""
INTERPRETED: bool = triton.knobs.runtime.interpret
"""True if the kernels were made for the interpreter, which computes bf16 wrongly without UPCAST."""

# These change from pass to pass; their alignment is not worth a variant, for they are read as scalars.
SEGMENT_POINTERS = ["p_table", "p_seg_start", "p_seg_slot", "p_pass", "p_end", "p_planes", "p_num_runs"]
PLANE_SCALARS = ["blocks", "split_k", "stride_table"]


@triton.jit
def rows_of(p_slot, N_SLICES: tl.constexpr):
    """How many rows a slot has over all its slices."""
    rows = 0
    for i in tl.static_range(N_SLICES):
        rows += tl.load(p_slot + FIELDS * i).to(tl.int32)
    return rows


@triton.jit
def tiles_of(first, n, p_table, p_seg_slot, stride_table, N_SLICES: tl.constexpr, BLOCK_R: tl.constexpr):
    """[SCAN]: tiles of rows that the segments from the first on have, by the ranks of their slots."""
    o_s = first + tl.arange(0, SCAN)
    m_s = o_s < n
    o_slot = tl.load(p_seg_slot + o_s, mask=m_s, other=0).to(tl.int64) * stride_table
    b_rows = tl.zeros([SCAN], tl.int32)
    for i in tl.static_range(N_SLICES):
        b_rows += tl.load(p_table + o_slot + FIELDS * i, mask=m_s, other=0).to(tl.int32)
    return tl.cdiv(b_rows, BLOCK_R)


@triton.jit
def segment_of_tile(i, n, p_table, p_seg_slot, stride_table, N_SLICES: tl.constexpr, BLOCK_R: tl.constexpr):
    """(segment, tile of its rows) of a tile of the step."""
    i_s, before, begin = 0, 0, 0
    for first in range(0, n, SCAN):
        b_tiles = tiles_of(first, n, p_table, p_seg_slot, stride_table, N_SLICES, BLOCK_R)
        b_ends = before + tl.cumsum(b_tiles, 0)  # [SCAN]
        m_passed = (b_ends <= i) & (first + tl.arange(0, SCAN) < n)
        i_s += tl.sum(m_passed.to(tl.int32), 0)
        begin = tl.maximum(begin, tl.max(tl.where(m_passed, b_ends, 0), 0))
        before += tl.sum(b_tiles, 0)
    return i_s, i - begin


@triton.jit
def planes_of(tiles, blocks, split_k):
    """(planes, blocks of K that each reduces) of so many tiles; at most what `ShrinkConfig.planes` says."""
    wanted = tl.cdiv(tl.num_programs(0), tl.maximum(tiles, 1))
    per_plane = tl.maximum(tl.maximum(blocks // wanted, tl.cdiv(blocks, split_k)), 1)
    return tl.cdiv(blocks, per_plane), per_plane


@triton.jit
def part_of(i, n, places):
    """(which of n, its part, its parts) of the i-th of so many places, which they share as evenly as can be."""
    return i % n, i // n, tl.cdiv(places - i % n, n)


@triton.jit
def rows_each(p_end):
    """Entries of a segment of the step in the mean, rounded up: more parts would have none."""
    return tl.cdiv(tl.load(p_end + 1), tl.maximum(tl.load(p_end), 1))


@triton.jit
def entries_of(p_seg_start, i_s, part, parts):
    """(first entry, last) of one of the parts of a segment."""
    start, end = tl.load(p_seg_start + i_s), tl.load(p_seg_start + i_s + 1)
    entries = tl.cdiv(end - start, parts)
    start += part * entries
    return start, tl.minimum(start + entries, end)


@triton.jit
def shrink_tile(
    i_plane,
    i_r,
    start,
    end,
    rows,
    p_slot,
    p_x,
    p_a,
    p_y,
    p_token_ids,
    p_scales,
    K,
    blocks_k,
    stride_x,
    stride_a,
    p_entries,
    stride_y,
    N_SLICES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """y[plane, p, r] of the entries start..end and one tile of the slot's rows; see ``shrink_kernel``."""
    # The slot's rows over all slices are one axis: a tile may hold rows of q, k and v, and reads x once.
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    o_row = tl.zeros([BLOCK_R], tl.int64)  # [BLOCK_R] first element of the row, in multiples of ROW
    first = 0
    for i in tl.static_range(N_SLICES):
        begin = tl.load(p_slot + FIELDS * i + 1).to(tl.int64) // ROW
        o_row = tl.where(o_r >= first, begin + (o_r - first).to(tl.int64) * (stride_a // ROW), o_row)
        first += tl.load(p_slot + FIELDS * i).to(tl.int32)
    o_row *= ROW  # said last: what the compiler knows of a multiple does not get through a choice
    m_r = o_r < rows  # [BLOCK_R]

    first_k = i_plane * blocks_k * BLOCK_K  # known to be a multiple of BLOCK_K: loads along K are vectors
    last_k = tl.minimum(first_k + blocks_k * BLOCK_K, K)
    for i_t in tl.range(start, end, BLOCK_T, num_stages=1):
        o_p = i_t + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        m_p = o_p < end  # [BLOCK_T]
        o_t = tl.load(p_token_ids + o_p, mask=m_p, other=0).to(tl.int64)  # [BLOCK_T]
        b_y = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        for i_k in range(first_k, last_k, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            m_k = o_k < K
            b_x = tl.load(
                p_x + o_t[:, None] * stride_x + o_k[None, :], mask=m_p[:, None] & m_k[None, :], other=0.0
            )  # [BLOCK_T, BLOCK_K]
            b_a = tl.load(
                p_a + o_row[None, :] + o_k[:, None], mask=m_r[None, :] & m_k[:, None], other=0.0
            )  # [BLOCK_K, BLOCK_R]
            if UPCAST:
                b_x, b_a = b_x.to(tl.float32), b_a.to(tl.float32)
            b_y = tl.dot(b_x, b_a, b_y, input_precision="ieee")
        if p_scales is not None:
            b_y *= tl.load(p_scales + o_p, mask=m_p, other=0.0)[:, None]
        first_y = i_plane.to(tl.int64) * tl.load(p_entries)  # loaded here: registers are dear in the loop
        o_y = (first_y + o_p[:, None]) * stride_y + o_r[None, :]
        tl.store(p_y + o_y, b_y, mask=m_p[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=PLANE_SCALARS, do_not_specialize_on_alignment=SEGMENT_POINTERS)
def shrink_kernel(
    p_x,  # [T, K]
    p_a,  # flat
    p_y,  # fp32 [planes, entries of the step, R]
    p_planes,  # int32 [1]: how many there are, for expand
    p_table,  # [slots, N_SLICES, FIELDS], slots stride_table apart
    p_token_ids,  # int32 [P]
    p_seg_start,  # int32 [S + 1]
    p_seg_slot,  # int32 [S]
    p_end,  # int32 [2]: segments of the step, and entries
    p_scales,  # fp32 [P], or None
    K,
    blocks,  # of K
    split_k,
    stride_x,
    stride_a,
    stride_table,
    stride_y,
    N_SLICES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """y[plane, p, r] = scale[p] * sum over the plane's part of K of x[token(p), k] * a[row(r) + k].

    The programs share the (tiles of rows of segments, planes) of the step, whose ranks they read: the fewer
    tiles it has, the more planes there are, and then parts of segments. Every plane of every row that the slot
    has is written, also where the plane's part of K is empty: nothing needs to be zeroed.
    """
    n, tiles = tl.load(p_end), 0
    for first in range(0, n, SCAN):
        tiles += tl.sum(tiles_of(first, n, p_table, p_seg_slot, stride_table, N_SLICES, BLOCK_R), 0)
    # At least a tile for each segment, for y has room for the planes of so many.
    planes, blocks_k = planes_of(tl.maximum(tiles, n), blocks, split_k)
    if tl.program_id(0) == 0:
        tl.store(p_planes, planes)
    most = tiles * rows_each(p_end)
    places = tl.maximum(tl.minimum(tl.num_programs(0) // planes, most), tiles)
    for i in tl.range(tl.program_id(0), places * planes, tl.num_programs(0), num_stages=1):
        i_tile, part, parts = part_of(i // planes, tiles, places)
        i_s, i_r = segment_of_tile(i_tile, n, p_table, p_seg_slot, stride_table, N_SLICES, BLOCK_R)
        p_slot = p_table + tl.load(p_seg_slot + i_s).to(tl.int64) * stride_table
        start, end = entries_of(p_seg_start, i_s, part, parts)
        shrink_tile(
            i % planes,
            i_r,
            start,
            end,
            rows_of(p_slot, N_SLICES),
            p_slot,
            p_x,
            p_a,
            p_y,
            p_token_ids,
            p_scales,
            K,
            blocks_k,
            stride_x,
            stride_a,
            p_end + 1,
            stride_y,
            N_SLICES,
            BLOCK_T,
            BLOCK_R,
            BLOCK_K,
            UPCAST,
        )


@triton.constexpr_function
def steps_of(sizes, slices, step):
    """Tiles of so many columns that the first slices have."""
    return sum(-(-size // step) for size in sizes[:slices])


@triton.jit
def tiles_across(width, SIZES: tl.constexpr, N_SLICES: tl.constexpr):
    """The same of columns that are no constant."""
    tiles = tl.cdiv(SIZES[0], width)
    for i in tl.static_range(1, N_SLICES):
        tiles += tl.cdiv(SIZES[i], width)
    return tiles


@triton.jit
def shared_tiles(n, SIZES: tl.constexpr, N_SLICES: tl.constexpr, STEP_N: tl.constexpr, BLOCK_N: tl.constexpr):
    """(columns of a tile, tiles of a segment) where the programs share n segments; as `tuning.width_of`.

    A program goes through as few tiles, one after the other, as if they had BLOCK_N columns; they are as narrow
    as that allows.
    """
    STEPS: tl.constexpr = steps_of(SIZES, N_SLICES, STEP_N)
    programs = tl.num_programs(0)
    places = programs * tl.maximum(tl.cdiv(n * STEPS, programs * (BLOCK_N // STEP_N)), 1)
    width = tl.maximum(tl.cdiv(n * STEPS, places), 1) * STEP_N
    wider = tl.minimum(width + STEP_N, BLOCK_N)  # the last tile of each slice is not full
    width = tl.where(n * tiles_across(width, SIZES, N_SLICES) > places, wider, width)
    return width, tiles_across(width, SIZES, N_SLICES)


@triton.jit
def columns_of_tile(i_tile, width, size, BLOCK_N: tl.constexpr):
    """[BLOCK_N]: the columns in its slice from where a tile begins, and which of them it has."""
    o_tile = tl.arange(0, BLOCK_N)
    o_n = i_tile * width + o_tile
    return o_n, (o_tile < width) & (o_n < size)


@triton.jit
def slice_of_tile(
    i_n,
    p_slot,
    OFFSETS: tl.constexpr,
    SIZES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    N_SLICES: tl.constexpr,
    width,
):
    """(rank, element in b, vectors / ROW, size, offset, first row, tile) of the slice of a tile of columns."""
    # It is the last slice whose tiles begin at or before the tile.
    rank = tl.load(p_slot).to(tl.int32)
    element = tl.load(p_slot + 2).to(tl.int64)
    vectors = (tl.load(p_slot + 3).to(tl.int64) // ROW).to(tl.int32)
    size, offset = SIZES[0], OFFSETS[0]
    column, rows, i_tile, tiles = 0, rank, i_n, tl.cdiv(SIZES[0], width)
    for i in tl.static_range(1, N_SLICES):
        here = i_n >= tiles
        slice_rank = tl.load(p_slot + FIELDS * i).to(tl.int32)
        rank = tl.where(here, slice_rank, rank)
        element = tl.where(here, tl.load(p_slot + FIELDS * i + 2).to(tl.int64), element)
        vectors = tl.where(here, (tl.load(p_slot + FIELDS * i + 3).to(tl.int64) // ROW).to(tl.int32), vectors)
        size, offset = tl.where(here, SIZES[i], size), tl.where(here, OFFSETS[i], offset)
        column, i_tile = tl.where(here, rows, column), tl.where(here, i_n - tiles, i_tile)
        rows += slice_rank
        tiles += tl.cdiv(SIZES[i], width)
    return rank, tl.multiple_of(element, ALIGNMENT), vectors, size, offset, column, i_tile


@triton.jit
def finished(b_sum, p_vectors, vectors, o_n, size, PER_FLOAT: tl.constexpr):
    """b_sum [T, N] times c, plus d, where a slot has them for these columns; PER_FLOAT elements are a float."""
    p_c = p_vectors + vectors.to(tl.int64) * (ROW // PER_FLOAT) + o_n  # [N]
    m_c = o_n < tl.where(vectors > 0, size, 0)
    b_sum *= tl.load(p_c, mask=m_c, other=1.0)[None, :]
    return b_sum + tl.load(p_c + tl.cdiv(size, ROW) * ROW, mask=m_c, other=0.0)[None, :]


@triton.constexpr_function
def planes_at_once(planes, elements):
    """How many planes of so many elements are summed at once: up to 4096 elements, or one plane."""
    return min(planes, max(1, 4096 // elements))


@triton.jit
def sum_of_planes(
    p_y,
    o_p,
    m_p,
    o_r,
    m_r,
    planes,
    stride_y_plane,
    stride_y,
    PLANES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """[BLOCK_T, BLOCK_R] fp32, in an order of summation that depends on shapes alone.

    As one load of several planes, because the compiler makes of a sum of loads one transposition through shared
    memory per load, and waits for each.
    """
    AT_ONCE: tl.constexpr = planes_at_once(PLANES, BLOCK_T * BLOCK_R)
    o_y = o_p[None, :, None].to(tl.int64) * stride_y + o_r[None, None, :]
    m_y = m_p[None, :, None] & m_r[None, None, :]
    b_y = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for first in tl.static_range(0, PLANES, AT_ONCE):
        o_plane = (first + tl.arange(0, AT_ONCE))[:, None, None]
        b_planes = tl.load(
            p_y + o_plane.to(tl.int64) * stride_y_plane + o_y,
            mask=(o_plane < planes) & m_y,
            other=0.0,
            cache_modifier=".cg",
        )  # [AT_ONCE, BLOCK_T, BLOCK_R]
        b_y += tl.sum(b_planes, 0)
    return b_y


@triton.jit
def product(
    rank,
    p_b,  # of the slice [rank, size]
    p_y,  # at the first column of the slice
    size,
    o_n,
    m_n,
    o_p,
    m_p,
    planes,
    stride_y_plane,
    stride_y,
    PLANES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """[BLOCK_T, BLOCK_N] fp32: y of some entries times some columns of a slice's B."""
    b_sum = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for i_r in range(0, rank, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)  # [BLOCK_R] rank in the slice
        m_r = o_r < rank
        b_b = tl.load(
            p_b + o_r[:, None] * size + o_n[None, :], mask=m_r[:, None] & m_n[None, :], other=0.0
        )  # [BLOCK_R, BLOCK_N]
        b_y = sum_of_planes(
            p_y, o_p, m_p, o_r, m_r, planes, stride_y_plane, stride_y, PLANES, BLOCK_T, BLOCK_R
        ).to(p_b.dtype.element_ty)
        if UPCAST:
            b_y, b_b = b_y.to(tl.float32), b_b.to(tl.float32)
        b_sum = tl.dot(b_y, b_b, b_sum, input_precision="ieee")
    return b_sum


@triton.jit
def expand_tile(
    i_s,
    i_n,
    part,
    parts,
    width,
    planes,
    p_y,
    p_b,
    p_vectors,
    p_out,
    p_table,
    p_token_ids,
    p_seg_start,
    p_seg_slot,
    p_end,
    stride_table,
    stride_y,
    stride_out,
    OFFSETS: tl.constexpr,
    SIZES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    N_SLICES: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of so many columns of a part of a segment; a tile lies in one slice."""
    p_slot = p_table + tl.load(p_seg_slot + i_s).to(tl.int64) * stride_table
    rank, element, vectors, size, offset, column, i_tile = slice_of_tile(
        i_n, p_slot, OFFSETS, SIZES, ALIGNMENT, N_SLICES, width
    )
    start, end = entries_of(p_seg_start, i_s, part, parts)
    end = tl.where((rank > 0) | (vectors > 0), end, start)  # nothing to do
    stride_y_plane = tl.load(p_end + 1).to(tl.int64) * stride_y
    o_n, m_n = columns_of_tile(i_tile, width, size, BLOCK_N)
    for i_t in tl.range(start, end, BLOCK_T, num_stages=1):
        o_p = i_t + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        m_p = o_p < end
        o_t = tl.load(p_token_ids + o_p, mask=m_p, other=0).to(tl.int64)  # [BLOCK_T]
        b_sum = product(
            rank, p_b + element, p_y + column, size, o_n, m_n, o_p, m_p, planes, stride_y_plane, stride_y,
            PLANES, BLOCK_T, BLOCK_R, BLOCK_N, UPCAST,
        )  # fmt: skip
        p_tile = p_out + o_t[:, None] * stride_out + offset + o_n[None, :]
        m_tile = m_p[:, None] & m_n[None, :]
        b_sum += tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_sum = finished(b_sum, p_vectors, vectors, o_n, size, 32 // p_b.dtype.element_ty.primitive_bitwidth)
        tl.store(p_tile, b_sum.to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit
def run_of(i_s, p_table, p_seg_start, p_seg_slot, stride_table):
    """(its place in the table, 1 or 0 for one of the base, first entry, last) of a segment of all rows."""
    slot = tl.load(p_seg_slot + i_s)
    p_slot = p_table + tl.maximum(slot, 0).to(tl.int64) * stride_table
    return p_slot, (slot >= 0).to(tl.int32), tl.load(p_seg_start + i_s), tl.load(p_seg_start + i_s + 1)


@triton.jit
def with_update(
    p_base,  # [BLOCK_T, 1]: at the first column of the slice
    adapted,
    rank,
    element,
    vectors,
    size,
    column,
    o_n,
    m_n,
    o_p,
    m_p,
    planes,
    p_y,
    p_b,
    p_vectors,
    stride_y_plane,
    stride_y,
    PLANES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """[BLOCK_T, BLOCK_N] fp32: what expand would leave of columns of a slice, rounded as it rounds; else 0.

    ``adapted`` is 0 for rows of the base, which keep their bits.
    """
    b_sum = product(
        rank * adapted, p_b + element, p_y + column, size, o_n, m_n, o_p, m_p, planes, stride_y_plane, stride_y,
        PLANES, BLOCK_T, BLOCK_R, BLOCK_N, UPCAST,
    )  # fmt: skip
    b_sum += tl.load(p_base + o_n[None, :], mask=m_p[:, None] & m_n[None, :], other=0.0).to(tl.float32)
    per_float: tl.constexpr = 32 // p_b.dtype.element_ty.primitive_bitwidth
    b_sum = finished(b_sum, p_vectors, vectors * adapted, o_n, size, per_float)
    return tl.where(m_n[None, :], b_sum, 0.0).to(p_base.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=PLANE_SCALARS, do_not_specialize_on_alignment=SEGMENT_POINTERS)
def expand_kernel(
    p_y,  # fp32 [planes, entries of the step, R]
    p_planes,  # int32 [1]: how many there are, from shrink
    p_b,  # flat
    p_vectors,  # the same as fp32
    p_out,  # [T, N]
    p_table,  # [slots, N_SLICES, FIELDS], slots stride_table apart
    p_token_ids,  # int32 [P]
    p_seg_start,  # int32 [S + 1]
    p_seg_slot,  # int32 [S]
    p_pass,  # int32 [2]: the first segment of this pass, and the first behind it
    p_end,  # int32 [2]: segments of the step, and entries
    stride_table,
    stride_y,
    stride_out,
    OFFSETS: tl.constexpr,  # first column of each slice
    SIZES: tl.constexpr,  # columns of each slice
    ALIGNMENT: tl.constexpr,  # of the blocks of B, in elements
    N_SLICES: tl.constexpr,
    PLANES: tl.constexpr,  # the power of two that holds the most planes
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEP_N: tl.constexpr,  # columns of a tile are a multiple of it
    BLOCK_N: tl.constexpr,  # columns of a tile at most
    UPCAST: tl.constexpr,
):
    """out[token(p), offset + n] += sum over r of (sum over planes of y[plane, p, column + r]) * b[r, n].

    Where a slot has vectors, that is multiplied by c[n], and d[n] is added, before it is rounded. The programs
    share the (segments of the pass, tiles of columns); tiles are narrow where segments are few, and where there
    are fewer than programs, these share the parts of segments.
    """
    first, planes = tl.load(p_pass), tl.load(p_planes)
    n = tl.load(p_pass + 1) - first
    width, tiles = shared_tiles(n, SIZES, N_SLICES, STEP_N, BLOCK_N)
    places = tl.maximum(tl.minimum(tl.num_programs(0) // tiles, n * rows_each(p_end)), n)
    for i in tl.range(tl.program_id(0), places * tiles, tl.num_programs(0), num_stages=1):
        i_s, part, parts = part_of(i // tiles, n, places)
        expand_tile(
            first + i_s, i % tiles, part, parts, width, planes, p_y, p_b, p_vectors, p_out, p_table,
            p_token_ids, p_seg_start, p_seg_slot, p_end, stride_table, stride_y, stride_out, OFFSETS, SIZES,
            ALIGNMENT, N_SLICES, PLANES, BLOCK_T, BLOCK_R, BLOCK_N, UPCAST,
        )  # fmt: skip
