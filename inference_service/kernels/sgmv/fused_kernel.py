"""Shrink and expand in one launch; names and shapes as in ``triton_kernels``.

The programs are few enough to be resident together, so that one may wait for another. Each takes its share of
all shrink tiles first and of the expand tiles then, so that nobody waits before all that it owes is done: the
wait always ends.

Ordering. A counter per segment holds how many of its tiles of shrink are done, then how many of its tiles of
expand. What makes y visible to who reads it:

1. Writer: all threads store y; the barrier orders them before one thread's atomic, which releases at the scope
   of the device. A release is cumulative: what the barrier ordered before it is released too.
2. Reader: one thread's atomic acquires at the scope of the device, until it sees the last of the writers. All
   of them add by an atomic, so that whoever sees the last one's value is ordered behind the releases of all.
   The barrier orders the loads of all threads behind it. They bypass the first-level cache (.cg), where y of
   an older launch may lie, and no loop around them is pipelined, which could move them above the wait.
3. The last reader sets the counter to 0. Each reader adds to it after its own wait is over, so that none still
   looks. The next launch on the stream, of whatever group, finds all counters at 0: no kernel clears them, and
   a graph may replay the launch any number of times.

One set of counters serves launches that follow one another on one stream, not launches that overlap.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# The bodies are Triton, not Python: only the compiler knows their types.

import triton
import triton.language as tl

from inference_service.kernels.sgmv.triton_kernels import (
    FIELDS,
    PLANE_SCALARS,
    SEGMENT_POINTERS,
    finished,
    planes_of,
    rows_of,
    shrink_tile,
    slice_of_tile,
    sum_of_planes,
)


@triton.jit
def readers_of(p_slot, SIZES: tl.constexpr, N_SLICES: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many tiles of expand a slot has: those of slices of rank 0 without vectors do nothing."""
    readers = 0
    for i in tl.static_range(N_SLICES):
        acts = (tl.load(p_slot + FIELDS * i) > 0) | (tl.load(p_slot + FIELDS * i + 3) > 0)
        readers += tl.where(acts, tl.cdiv(SIZES[i], BLOCK_N), 0)
    return readers


@triton.jit
def expand_tile(
    i_n,
    start,
    end,
    p_slot,
    p_counter,
    p_y,
    p_b,
    p_vectors,
    p_out,
    p_token_ids,
    planes,
    stride_y_plane,
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
    """``expand_kernel`` for one tile: b and out are read first, then y is waited for."""
    rank, element, vectors, size, offset, column, i_tile = slice_of_tile(
        i_n, p_slot, OFFSETS, SIZES, ALIGNMENT, N_SLICES, BLOCK_N
    )
    if (rank > 0) | (vectors > 0):
        writers = tl.cdiv(rows_of(p_slot, N_SLICES), BLOCK_R) * planes
        readers = readers_of(p_slot, SIZES, N_SLICES, BLOCK_N)
        o_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N] column in the slice
        o_r = tl.arange(0, BLOCK_R)  # [BLOCK_R] rank in the slice
        m_n, m_r = o_n < size, o_r < rank
        p_block = p_b + element + o_r[:, None] * size + o_n[None, :]
        b_b = tl.load(p_block, mask=m_r[:, None] & m_n[None, :], other=0.0)  # [BLOCK_R, BLOCK_N]
        for i_t in tl.range(start, end, BLOCK_T, num_stages=1):
            o_p = i_t + tl.arange(0, BLOCK_T)  # [BLOCK_T]
            m_p = o_p < end
            o_t = tl.load(p_token_ids + o_p, mask=m_p, other=0).to(tl.int64)  # [BLOCK_T]
            p_tile = p_out + o_t[:, None] * stride_out + offset + o_n[None, :]
            m_tile = m_p[:, None] & m_n[None, :]
            b_out = tl.load(p_tile, mask=m_tile, other=0.0)  # [BLOCK_T, BLOCK_N]

            while tl.atomic_add(p_counter, 0, sem="acquire", scope="gpu") < writers:
                pass
            tl.debug_barrier()

            b_y = sum_of_planes(
                p_y + column, o_p, m_p, o_r, m_r, planes, stride_y_plane, stride_y, PLANES, BLOCK_T, BLOCK_R
            ).to(p_b.dtype.element_ty)
            if UPCAST:
                b_sum = tl.dot(b_y.to(tl.float32), b_b.to(tl.float32), input_precision="ieee")
            else:
                b_sum = tl.dot(b_y, b_b, input_precision="ieee")
            b_sum += b_out.to(tl.float32)
            # asked for once more: to keep it while y is waited for would cost a register too many
            _, _, again, _, _, _, _ = slice_of_tile(i_n, p_slot, OFFSETS, SIZES, ALIGNMENT, N_SLICES, BLOCK_N)
            b_sum = finished(b_sum, p_vectors, again, o_n, size, 32 // p_b.dtype.element_ty.primitive_bitwidth)
            tl.store(p_tile, b_sum.to(p_out.dtype.element_ty), mask=m_tile)

        before = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu")
        if before == writers + readers - 1:
            tl.atomic_xchg(p_counter, 0, sem="relaxed", scope="gpu")


@triton.jit(do_not_specialize=PLANE_SCALARS, do_not_specialize_on_alignment=SEGMENT_POINTERS)
def fused_kernel(
    p_x,  # [T, K]
    p_a,  # flat
    p_b,  # flat
    p_vectors,  # the same as fp32
    p_y,  # fp32 [planes, entries of the step, R]
    p_out,  # [T, N]
    p_table,  # [slots, N_SLICES, FIELDS], slots stride_table apart
    p_token_ids,  # int32 [P]
    p_seg_start,  # int32 [S + 1]
    p_seg_slot,  # int32 [S]
    p_pass,  # int32 [2]: 0, and the segments that are expanded: those of the first pass
    p_end,  # int32 [2]: segments of the step, and entries
    p_scales,  # fp32 [P], or None
    p_counters,  # int32 [segments of a pass, COUNTER_STRIDE], of each row the first; 0 before and after
    K,
    blocks,  # of K
    row_tiles,
    split_k,
    stride_x,
    stride_a,
    stride_table,
    stride_y,
    stride_out,
    COVERING: tl.constexpr,
    OFFSETS: tl.constexpr,
    SIZES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    N_SLICES: tl.constexpr,
    PLANES: tl.constexpr,  # the power of two that holds planes
    COUNTER_STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,  # no rank is larger
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``shrink_kernel`` of all segments, then ``expand_kernel`` of those of the first pass."""
    i_program, programs = tl.program_id(0), tl.num_programs(0)
    n, expanded = tl.load(p_end), tl.load(p_pass + 1)
    planes, blocks_k = planes_of(n, blocks, row_tiles, split_k, COVERING)

    tiles = row_tiles * planes
    for i in tl.range(i_program, n * tiles, programs, num_stages=1):
        i_s, i_r, i_plane = i // tiles, i % tiles // planes, i % planes
        p_slot = p_table + tl.load(p_seg_slot + i_s).to(tl.int64) * stride_table
        rows = rows_of(p_slot, N_SLICES)
        if i_r * BLOCK_R < rows:
            shrink_tile(
                i_plane,
                i_r,
                tl.load(p_seg_start + i_s),
                tl.load(p_seg_start + i_s + 1),
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
                p_end + 1,
                stride_y,
                N_SLICES,
                BLOCK_T,
                BLOCK_R,
                BLOCK_K,
                UPCAST,
            )
            if i_s < expanded:
                tl.debug_barrier()
                tl.atomic_add(p_counters + i_s * COUNTER_STRIDE, 1, sem="release", scope="gpu")

    tiles_n = 0
    for i in tl.static_range(N_SLICES):
        tiles_n += tl.cdiv(SIZES[i], BLOCK_N)
    stride_y_plane = tl.load(p_end + 1).to(tl.int64) * stride_y
    for i in tl.range(i_program, expanded * tiles_n, programs, num_stages=1):
        i_s, i_n = i // tiles_n, i % tiles_n
        expand_tile(
            i_n,
            tl.load(p_seg_start + i_s),
            tl.load(p_seg_start + i_s + 1),
            p_table + tl.load(p_seg_slot + i_s).to(tl.int64) * stride_table,
            p_counters + i_s * COUNTER_STRIDE,
            p_y,
            p_b,
            p_vectors,
            p_out,
            p_token_ids,
            planes,
            stride_y_plane,
            stride_y,
            stride_out,
            OFFSETS,
            SIZES,
            ALIGNMENT,
            N_SLICES,
            PLANES,
            BLOCK_T,
            BLOCK_R,
            BLOCK_N,
            UPCAST,
        )
