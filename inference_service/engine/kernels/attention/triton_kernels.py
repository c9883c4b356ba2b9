"""The kernels. T rows, H query heads, KV heads of keys and values, D of a head, P partial rows.

GROUP = H / KV query heads share one head of keys and values, and are folded into the axis of rows: a program
reads keys and values once for all of them. Weights are powers of two: log2(e) is in what products are
scaled with.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# The bodies are Triton, not Python: only the compiler knows their types.

import triton
import triton.language as tl

from inference_service.engine.kernels.sgmv.triton_kernels import (
    PLANE_SCALARS,
    SEGMENT_POINTERS,
    run_of,
    slice_of_tile,
    with_update,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST_SCALE = tl.constexpr(1e-30)
INTERPRETED: bool = triton.knobs.runtime.interpret
"""True if the kernels below were made for the interpreter, which computes bf16 wrongly without UPCAST."""


@triton.jit
def _turned(
    b_x, b_pair, b_weight, b_pair_weight, m_normed, m_pair, b_cos, b_sin, eps, offset, dtype: tl.constexpr,
    NORMED: tl.constexpr, D: tl.constexpr, ROUND_NORM: tl.constexpr,
):  # fmt: skip
    """Heads, or a head of rows, [.., BLOCK_D] fp32, normed and rotated with their pairs; in dtype."""
    if NORMED:
        b_rms = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / D + eps)[:, None]
        b_normed, b_pair = b_x * b_rms, b_pair * b_rms
        if ROUND_NORM:
            b_normed, b_pair = b_normed.to(dtype).to(tl.float32), b_pair.to(dtype).to(tl.float32)
        b_normed = (b_normed * (b_weight + offset)).to(dtype).to(tl.float32)
        b_pair = (b_pair * (b_pair_weight + offset)).to(dtype).to(tl.float32)
        b_x = tl.where(m_normed, b_normed, b_x)
    b_turned = (b_x * b_cos).to(dtype).to(tl.float32) + b_pair * b_sin
    return tl.where(m_pair, b_turned, b_x).to(dtype)


@triton.jit
def rope_write_kernel(
    p_heads,  # [T, H + 2 KV, D]
    p_q,  # [T, H, D], written
    p_out,  # [T, H, D], written where a row is padding
    p_keys,  # [KV, cache rows, D], written
    p_values,  # as p_keys
    p_cos,  # [T, ROTARY]
    p_sin,  # [T, ROTARY], the first half negated
    p_norm,  # [NORMED, D] or [D], or None
    p_scales,  # bf16 [2, KV, cache rows], written, of keys and values of 8 bits; None: they are the heads'
    p_cache_rows,  # int32 [T]
    eps,
    offset,  # added to the weights of the norm
    stride_heads,
    stride_turn,
    stride_norm,  # of heads; 0: they share one weight
    stride_kv,
    stride_cache,
    stride_scales,  # of heads
    H: tl.constexpr,
    KV: tl.constexpr,  # 0: there are queries alone
    NORMED: tl.constexpr,  # heads that are normed
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    ROUND_NORM: tl.constexpr,  # whether what is normed is rounded before it is multiplied with the weight
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """q = turn(norm(q)); keys[cache row] = turn(norm(k)); values[cache row] = v, or norm(v).

    One program per (row, tile of heads). What is stored is rounded where the torch path rounds it; numbers of 8
    bits and their scales have the bits of the torch path. In float32, a GPU adds products without a rounding.
    Padding rows write no key and no value, and their output, which no other kernel writes, is 0.
    """
    i_t, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cache_row = tl.load(p_cache_rows + i_t).to(tl.int64)
    dtype = p_heads.dtype.element_ty
    HALF: tl.constexpr = ROTARY // 2
    o_h = i_h * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    o_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    o_pair = tl.where(o_d < HALF, o_d + HALF, o_d - HALF)  # [BLOCK_D] what o_d is turned with
    m_turned = (o_h < H + KV)[:, None]  # [BLOCK_H, 1]
    m_heads = (o_h < H + 2 * KV)[:, None] & (o_d < D)[None, :]  # [BLOCK_H, BLOCK_D]
    m_pair = m_turned & (o_d < ROTARY)[None, :]

    p_row = p_heads + i_t * stride_heads + o_h[:, None] * D
    b_x = tl.load(p_row + o_d[None, :], mask=m_heads, other=0.0).to(tl.float32)
    b_pair = tl.load(p_row + o_pair[None, :], mask=m_pair, other=0.0).to(tl.float32)
    b_weight, b_pair_weight = b_x, b_x
    if p_norm is not None:
        p_weight = p_norm + o_h[:, None] * stride_norm
        m_weight = m_heads & (o_h < NORMED)[:, None]
        b_weight = tl.load(p_weight + o_d[None, :], mask=m_weight, other=0.0).to(tl.float32)
        b_pair_weight = tl.load(p_weight + o_pair[None, :], mask=m_pair, other=0.0).to(tl.float32)
    o_turn = i_t * stride_turn + o_d
    b_cos = tl.load(p_cos + o_turn, mask=o_d < ROTARY, other=1.0).to(tl.float32)[None, :]
    b_sin = tl.load(p_sin + o_turn, mask=o_d < ROTARY, other=0.0).to(tl.float32)[None, :]
    m_normed = (o_h < NORMED)[:, None]
    b_x = _turned(
        b_x, b_pair, b_weight, b_pair_weight, m_normed, m_pair, b_cos, b_sin, eps, offset, dtype, NORMED, D,
        ROUND_NORM,
    )  # fmt: skip

    o_q = (i_t * H + o_h[:, None]) * D + o_d[None, :]
    m_q = m_heads & (o_h < H)[:, None]
    tl.store(p_q + o_q, b_x, mask=m_q)
    if cache_row < 0:
        tl.store(p_out + o_q, tl.zeros([BLOCK_H, BLOCK_D], dtype), mask=m_q)
    else:
        o_cache = cache_row * stride_cache + o_d[None, :]
        o_k, o_v = (o_h - H).to(tl.int64)[:, None], (o_h - H - KV).to(tl.int64)[:, None]
        m_k, m_v = m_heads & (o_k >= 0) & (o_k < KV), m_heads & (o_v >= 0)
        if p_scales is not None:
            b_scale, b_numbers = _narrowed(b_x, p_keys.dtype.element_ty)
            p_scale = p_scales + (o_h - H).to(tl.int64) * stride_scales + cache_row
            tl.store(p_scale, b_scale, mask=(o_h >= H) & (o_h < H + 2 * KV))
            tl.store(p_keys + o_k * stride_kv + o_cache, b_numbers, mask=m_k)
            tl.store(p_values + o_v * stride_kv + o_cache, b_numbers, mask=m_v)
        else:
            tl.store(p_keys + o_k * stride_kv + o_cache, b_x, mask=m_k)
            tl.store(p_values + o_v * stride_kv + o_cache, b_x, mask=m_v)


@triton.jit
def _narrowed(b_x, dtype: tl.constexpr):
    """Return the scales [BLOCK_H] of heads, rounded up to bf16, and their numbers in 8 bits."""
    b_x = b_x.to(tl.float32)
    b_scale = tl.div_rn(tl.max(tl.abs(b_x), axis=1), 127.0 if dtype == tl.int8 else 448.0)
    b_bits = tl.maximum(b_scale, LEAST_SCALE).to(tl.int32, bitcast=True)
    b_scale = ((b_bits + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
    b_x = tl.div_rn(b_x, b_scale[:, None])
    if dtype == tl.int8:
        b_x = tl.floor(b_x + 0.5)
    else:  # to four bits, nearest and even, before the cast: the interpreter's loses what it carries
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_bits = (b_bits + 0x7FFFF + ((b_bits >> 20) & 1)) & -0x100000
        b_x = b_bits.to(tl.float32, bitcast=True)
    return b_scale.to(tl.bfloat16), b_x.to(dtype)


@triton.jit(do_not_specialize=PLANE_SCALARS, do_not_specialize_on_alignment=SEGMENT_POINTERS)
def rope_write_update_kernel(
    p_heads,  # [T, H + 2 KV, D], of the base alone
    p_q,  # these as rope_write_kernel has them
    p_out,
    p_keys,
    p_values,
    p_cos,
    p_sin,
    p_norm,
    p_cache_rows,
    eps,
    offset,
    stride_heads,
    stride_turn,
    stride_norm,
    stride_kv,
    stride_cache,
    p_num_runs,  # int32 [1]: segments of all rows
    p_y,  # the others as sgmv's expand_kernel has them
    p_planes,
    p_b,
    p_vectors,
    p_table,
    p_token_ids,
    p_seg_start,
    p_seg_slot,
    p_end,
    stride_table,
    stride_y,
    OFFSETS: tl.constexpr,
    SIZES: tl.constexpr,  # multiples of D
    ALIGNMENT: tl.constexpr,
    N_SLICES: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
    H: tl.constexpr,
    KV: tl.constexpr,
    NORMED: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    ROUND_NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """As ``rope_write_kernel``, of heads with the adapters' updates.

    The programs share the (runs of rows, heads); where these are fewer, parts of the runs.
    """
    dtype: tl.constexpr = p_heads.dtype.element_ty
    HALF: tl.constexpr = ROTARY // 2
    HEADS: tl.constexpr = H + 2 * KV
    o_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    o_pair = tl.where(o_d < HALF, o_d + HALF, o_d - HALF)  # [BLOCK_D] what o_d is turned with
    runs = tl.load(p_num_runs) * HEADS
    parts = tl.maximum(tl.num_programs(0) // tl.maximum(runs, 1), 1)
    for i in tl.range(tl.program_id(0), runs * parts, tl.num_programs(0), num_stages=1):
        i_h = i % HEADS
        i_s = i // HEADS // parts
        p_slot, adapted, start, end = run_of(i_s, p_table, p_seg_start, p_seg_slot, stride_table)
        rows = tl.cdiv(end - start, parts)
        start += i // HEADS % parts * rows
        end = tl.minimum(start + rows, end)
        rank, element, vectors, size, _offset, column, i_tile = slice_of_tile(
            i_h, p_slot, OFFSETS, SIZES, ALIGNMENT, N_SLICES, D
        )
        planes, stride_y_plane = tl.load(p_planes), tl.load(p_end + 1).to(tl.int64) * stride_y
        first = i_tile * D  # of the head in its slice
        m_d = o_d < D
        o_h = i_h + tl.zeros([BLOCK_D], tl.int32)  # [BLOCK_D] the head, for masks
        m_turned = (o_d < ROTARY) & (o_h < H + KV)  # [BLOCK_D]
        turned = tl.where(i_h < H + KV, adapted, 0)
        b_weight, b_pair_weight = tl.zeros([1, BLOCK_D], tl.float32), tl.zeros([1, BLOCK_D], tl.float32)
        if p_norm is not None:
            p_weight = p_norm + i_h * stride_norm
            b_weight = tl.load(p_weight + o_d, mask=m_d & (o_h < NORMED), other=0.0).to(tl.float32)[None, :]
            b_pair_weight = tl.load(p_weight + o_pair, mask=m_turned, other=0.0).to(tl.float32)[None, :]
        for i_t in tl.range(start, end, BLOCK_T, num_stages=1):
            o_p = i_t + tl.arange(0, BLOCK_T)  # [BLOCK_T]
            m_p = o_p < end
            o_t = tl.load(p_token_ids + o_p, mask=m_p, other=0).to(tl.int64)  # [BLOCK_T]
            p_slice = p_heads + o_t[:, None] * stride_heads + (i_h * D - first)
            b_x = with_update(
                p_slice, adapted, rank, element, vectors, size, column, first + o_d, m_d, o_p, m_p, planes,
                p_y, p_b, p_vectors, stride_y_plane, stride_y, PLANES, BLOCK_T, BLOCK_R, BLOCK_D, UPCAST,
            )  # fmt: skip
            b_pair = with_update(
                p_slice, turned, rank, element, vectors, size, column, first + o_pair, m_turned, o_p, m_p,
                planes, p_y, p_b, p_vectors, stride_y_plane, stride_y, PLANES, BLOCK_T, BLOCK_R, BLOCK_D,
                UPCAST,
            )  # fmt: skip
            o_turn = o_t[:, None] * stride_turn + o_d[None, :]
            m_turn = m_p[:, None] & m_turned[None, :]
            b_cos = tl.load(p_cos + o_turn, mask=m_turn, other=1.0).to(tl.float32)
            b_sin = tl.load(p_sin + o_turn, mask=m_turn, other=0.0).to(tl.float32)
            b_x = _turned(
                b_x, b_pair, b_weight, b_pair_weight, (o_h < NORMED)[None, :], m_turn, b_cos, b_sin, eps,
                offset, dtype, NORMED, D, ROUND_NORM,
            )  # fmt: skip

            m_x = m_p[:, None] & m_d[None, :]
            b_row = tl.load(p_cache_rows + o_t, mask=m_p, other=-1).to(tl.int64)[:, None]  # [BLOCK_T, 1]
            o_q = (o_t[:, None] * H + i_h) * D + o_d[None, :]
            m_q = m_x & (o_h < H)[None, :]
            tl.store(p_q + o_q, b_x, mask=m_q)
            tl.store(p_out + o_q, tl.zeros([BLOCK_T, BLOCK_D], dtype), mask=m_q & (b_row < 0))
            o_cache = b_row * stride_cache + o_d[None, :]
            o_k, o_v = (o_h - H).to(tl.int64)[None, :], (o_h - H - KV).to(tl.int64)[None, :]
            m_cache = m_x & (b_row >= 0)
            tl.store(p_keys + o_k * stride_kv + o_cache, b_x, mask=m_cache & (o_k >= 0) & (o_k < KV))
            tl.store(p_values + o_v * stride_kv + o_cache, b_x, mask=m_cache & (o_v >= 0))


@triton.jit
def _attend(
    b_q,  # [BLOCK_M, BLOCK_D]
    b_acc,  # fp32 [BLOCK_M, BLOCK_D]
    b_max,  # fp32 [BLOCK_M]
    b_sum,  # fp32 [BLOCK_M]
    o_at,  # [BLOCK_M] position of each row
    first,
    last,
    p_keys,  # of one head [cache rows, D]
    p_values,
    p_key_scales,  # of one head [cache rows], or None
    p_value_scales,
    p_blocks,  # of one chunk
    stride_cache,
    scale,
    softcap,
    window,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,  # of the queries
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Take in the keys and values of the positions from first to last: (b_acc, b_max, b_sum).

    Unless MASKED, all rows see all of them, and they are a multiple of BLOCK_N.
    """
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    for i_n in range(first, last, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)  # [BLOCK_N] position
        m_n = o_n < last
        if MASKED:
            b_block = tl.load(p_blocks + o_n // BLOCK_SIZE, mask=m_n, other=0)
            m_k, m_v = m_n[None, :] & m_d[:, None], m_n[:, None] & m_d[None, :]
        else:
            b_block = tl.load(p_blocks + o_n // BLOCK_SIZE)
            m_k, m_v = m_d[:, None], m_d[None, :]
        o_place = b_block.to(tl.int64) * BLOCK_SIZE + o_n % BLOCK_SIZE  # [BLOCK_N]
        o_row = o_place * stride_cache
        b_k = tl.load(p_keys + o_row[None, :] + o_d[:, None], mask=m_k, other=0.0)  # [BLOCK_D, BLOCK_N]
        b_v = tl.load(p_values + o_row[:, None] + o_d[None, :], mask=m_v, other=0.0)  # [BLOCK_N, BLOCK_D]
        if p_key_scales is not None:
            b_key_scale = tl.load(p_key_scales + o_place, mask=m_n, other=0.0).to(tl.float32)
            b_value_scale = tl.load(p_value_scales + o_place, mask=m_n, other=0.0).to(tl.float32)
            b_k = b_k.to(tl.float32 if UPCAST else DTYPE)  # exact
            if tl.float16 == DTYPE:  # in which small values times small weights would be lost
                b_v = b_v.to(tl.float32) * b_value_scale[:, None]
            b_v = b_v.to(tl.float32 if UPCAST else DTYPE)
        if UPCAST:
            b_k = b_k.to(tl.float32)
        b_s = tl.dot(b_q, b_k, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        b_s = b_s * (scale if p_key_scales is None else (b_key_scale * scale)[None, :])
        if softcap is not None:
            b_s = softcap - 2 * softcap / (tl.exp2(b_s) + 1)  # tanh, for b_s is 2 log2(e) x
        if MASKED:
            m_seen = (o_n[None, :] <= o_at[:, None]) & m_n[None, :]
            if window is not None:
                m_seen = m_seen & (o_n[None, :] > o_at[:, None] - window)
            b_s = tl.where(m_seen, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_zero = b_new
        if MASKED:  # a row that has seen nothing yet
            b_zero = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_zero[:, None])
        b_shrink = tl.exp2(b_max - b_zero)
        b_sum = b_sum * b_shrink + tl.sum(b_p, axis=1)
        if p_key_scales is not None and tl.float16 != DTYPE:
            b_p = b_p * b_value_scale[None, :]
        b_p = b_p.to(DTYPE)
        if UPCAST:
            b_p, b_v = b_p.to(tl.float32), b_v.to(tl.float32)
        b_acc = tl.dot(b_p, b_v, b_acc * b_shrink[:, None], input_precision="ieee")
        b_max = b_new
    return b_acc, b_max, b_sum


@triton.jit
def attend_kernel(
    p_q,  # [T, H, D]
    p_out,  # [T, H, D], written by items that are whole
    p_partial,  # fp32 [P, H, D], written by pieces; None: nothing is cut
    p_lse,  # fp32 [P, H], likewise: log2 of the sum of the weights; -inf: the row sees nothing in the piece
    p_keys,  # [KV, cache rows, D]
    p_values,  # as p_keys
    p_scales,  # bf16 [2, KV, cache rows] of keys and values of 8 bits; None: they are the queries'
    p_items,  # int32 [items, 8]
    p_blocks,  # int32
    p_sinks,  # fp32 [H], or None: scores of what every row sees besides, and which has no value
    scale,
    softcap,  # or None
    window,  # or None
    stride_kv,
    stride_cache,
    stride_scales,  # of heads
    TILE: tl.constexpr,  # rows of an item at most; 1: decode
    MIN_SPAN: tl.constexpr,  # keys of a piece at least, a multiple of BLOCK_N
    GROUP: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,  # at least TILE * GROUP
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """What the rows of an item attend to, or one piece of it: they see what was before them, and themselves.

    One program per (head of keys, item).
    """
    i_h, i_item = tl.program_id(0), tl.program_id(1)
    p_item = p_items + 8 * i_item
    rows = tl.load(p_item + 1)
    if rows == 0:
        return
    row, at, first_block = tl.load(p_item), tl.load(p_item + 2), tl.load(p_item + 3)
    piece, pieces = tl.load(p_item + 4), tl.load(p_item + 5)
    first, last = 0, at + rows
    if window is not None:
        first = tl.maximum(at + 1 - window, 0)
    if p_partial is None:
        if piece > 0:
            return
    else:
        span = tl.maximum(tl.cdiv(tl.cdiv(last - first, pieces), BLOCK_N) * BLOCK_N, MIN_SPAN)
        first += piece * span
        last = tl.minimum(last, first + span)

    o_m = tl.arange(0, BLOCK_M)
    o_r = o_m // GROUP  # [BLOCK_M] row of the item
    o_d = tl.arange(0, BLOCK_D)
    m_m = (o_m < TILE * GROUP) & (o_r < rows)
    m_q = m_m[:, None] & (o_d < D)[None, :]
    o_head = i_h * GROUP + o_m % GROUP  # [BLOCK_M]
    o_q = ((row + o_r).to(tl.int64) * (KV * GROUP) + o_head)[:, None] * D + o_d[None, :]
    b_q = tl.load(p_q + o_q, mask=m_q, other=0.0)
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    if UPCAST:
        b_q = b_q.to(tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    if p_sinks is not None:  # noqa: SIM102 - the compiler knows this
        if piece == 0:  # of several pieces, the first has it
            b_max = tl.load(p_sinks + o_head, mask=m_m, other=0.0) * LOG2_E
            b_sum += 1.0
    p_keys += i_h.to(tl.int64) * stride_kv
    p_values += i_h.to(tl.int64) * stride_kv
    p_key_scales = None
    p_value_scales = None
    if p_scales is not None:
        p_key_scales = p_scales + i_h.to(tl.int64) * stride_scales
        p_value_scales = p_key_scales + KV * stride_scales
    p_blocks += first_block
    masked = first
    if TILE > 1 and window is None:
        # What all rows see: whole tiles of keys up to the first row's own; the rest is masked.
        masked = tl.minimum(tl.maximum((at + 1) // BLOCK_N * BLOCK_N, first), last)
        b_acc, b_max, b_sum = _attend(
            b_q, b_acc, b_max, b_sum, at + o_r, first, masked, p_keys, p_values, p_key_scales, p_value_scales,
            p_blocks, stride_cache, scale, softcap, None, D, BLOCK_SIZE, BLOCK_N, BLOCK_D, DTYPE, False, UPCAST,
        )  # fmt: skip
    b_acc, b_max, b_sum = _attend(
        b_q, b_acc, b_max, b_sum, at + o_r, masked, last, p_keys, p_values, p_key_scales, p_value_scales,
        p_blocks, stride_cache, scale, softcap, window, D, BLOCK_SIZE, BLOCK_N, BLOCK_D, DTYPE, True, UPCAST,
    )  # fmt: skip
    m_seen = m_m & (b_sum > 0)
    b_sum = tl.where(m_seen, b_sum, 1.0)
    b_acc /= b_sum[:, None]
    if p_partial is None:  # noqa: SIM114 - the compiler knows this, and leaves out the rest
        tl.store(p_out + o_q, b_acc.to(p_out.dtype.element_ty), mask=m_q)
    elif pieces == 1:
        tl.store(p_out + o_q, b_acc.to(p_out.dtype.element_ty), mask=m_q)
    else:
        o_part = tl.load(p_item + 6) + o_r * pieces + piece  # [BLOCK_M]
        o_part = o_part.to(tl.int64) * (KV * GROUP) + o_head
        tl.store(p_partial + o_part[:, None] * D + o_d[None, :], b_acc, mask=m_q & m_seen[:, None])
        tl.store(p_lse + o_part, tl.where(m_seen, b_max + tl.log2(b_sum), float("-inf")), mask=m_m)


@triton.jit
def merge_kernel(
    p_partial,  # fp32 [P, H, D]
    p_lse,  # fp32 [P, H]
    p_out,  # [T, H, D], written
    p_merges,  # int32 [merges, 4]
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum the pieces of a row in their order. One program per (head, row that is in pieces)."""
    i_h, i_row = tl.program_id(0), tl.program_id(1)
    pieces = tl.load(p_merges + 4 * i_row + 2)
    if pieces == 0:
        return
    row, first = tl.load(p_merges + 4 * i_row).to(tl.int64), tl.load(p_merges + 4 * i_row + 1).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_acc = tl.zeros([BLOCK_D], tl.float32)
    b_max = tl.full([1], float("-inf"), tl.float32)
    b_sum = tl.zeros([1], tl.float32)
    for i_s in range(0, pieces, BLOCK_S):
        o_s = i_s + tl.arange(0, BLOCK_S)
        o_part = (first + o_s) * H + i_h  # [BLOCK_S]
        b_lse = tl.load(p_lse + o_part, mask=o_s < pieces, other=float("-inf"))
        m_s = b_lse > float("-inf")
        b_new = tl.maximum(b_max, tl.max(b_lse, axis=0))
        b_zero = tl.where(b_new == float("-inf"), 0.0, b_new)  # [1]: a row that has seen nothing yet
        b_weight, b_shrink = tl.exp2(b_lse - b_zero), tl.exp2(b_max - b_zero)
        p_tile = p_partial + o_part[:, None] * D + o_d[None, :]
        b_tile = tl.load(p_tile, mask=m_s[:, None] & m_d[None, :], other=0.0)  # [BLOCK_S, BLOCK_D]
        b_acc = b_acc * b_shrink + tl.sum(b_tile * b_weight[:, None], axis=0)
        b_sum = b_sum * b_shrink + tl.sum(b_weight, axis=0)
        b_max = b_new
    tl.store(p_out + (row * H + i_h) * D + o_d, (b_acc / b_sum).to(p_out.dtype.element_ty), mask=m_d)
