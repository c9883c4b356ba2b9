"""The kernels. T tokens, k experts of each, E experts, P pairs of a token and an expert; K in, N out."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# The bodies are Triton, not Python: only the compiler knows their types.

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""True if the kernels were made for the interpreter, which computes bf16 wrongly without UPCAST."""


@triton.jit(do_not_specialize=["E", "k"])
def route_kernel(
    p_logits,  # [T, E]
    p_ids,  # int32 [T, k]
    p_weights,  # fp32 [T, k]
    E,
    k,
    stride_logits,
    RENORMALISED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The k largest logits of a row, and their probabilities, of all or of the chosen. One program per row.

    Of equal logits the first is taken. Whatever a row of padding holds, its experts are some that there are.
    """
    i_t = tl.program_id(0).to(tl.int64)
    o_e, o_k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    m_e = o_e < E
    b_left = tl.load(p_logits + i_t * stride_logits + o_e, mask=m_e, other=float("-inf")).to(tl.float32)
    top = tl.max(b_left, 0)
    total = tl.sum(tl.where(m_e, tl.exp(b_left - top), 0.0), 0)
    b_ids = tl.zeros([BLOCK_K], tl.int32)
    b_weights = tl.zeros([BLOCK_K], tl.float32)
    for j in range(k):
        best = tl.minimum(tl.argmax(b_left, 0, tie_break_left=True), E - 1)
        b_ids = tl.where(o_k == j, best, b_ids)
        b_weights = tl.where(o_k == j, tl.exp(tl.max(b_left, 0) - top), b_weights)
        b_left = tl.where(o_e == best, float("-inf"), b_left)
    if RENORMALISED:
        total = tl.sum(b_weights, 0)
    p_row = i_t * k + o_k
    tl.store(p_ids + p_row, b_ids, mask=o_k < k)
    tl.store(p_weights + p_row, b_weights / total, mask=o_k < k)


@triton.jit(do_not_specialize=["E", "P", "k", "tiles"])
def sort_kernel(
    p_ids,  # int32 [P]
    p_tokens,  # int32 [P]
    p_experts,  # int32 [P]
    p_places,  # int32 [P]
    p_tiles,  # int32 [tiles, 3]
    E,
    P,
    k,
    tiles,
    TILE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Places of the pairs by expert, in their order within one, and tiles of places. One program per expert.

    Every program counts all experts' pairs: nothing waits for another, and nothing is counted by atomics.
    """
    i_e = tl.program_id(0)
    o_e, o_p = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_P)
    b_counts = tl.zeros([BLOCK_E], tl.int32)
    for i_p in range(0, P, BLOCK_P):
        m_p = i_p + o_p < P
        b_ids = tl.load(p_ids + i_p + o_p, mask=m_p, other=0)
        b_counts += tl.histogram(b_ids, BLOCK_E, mask=m_p)
    b_tiles = (b_counts + TILE - 1) // TILE
    start, tile = tl.sum(tl.where(o_e < i_e, b_counts, 0), 0), tl.sum(tl.where(o_e < i_e, b_tiles, 0), 0)
    end, last = tl.sum(tl.where(o_e <= i_e, b_counts, 0), 0), tl.sum(tl.where(o_e <= i_e, b_tiles, 0), 0)

    for i in range(tile, last):
        first = start + (i - tile) * TILE
        tl.store(p_tiles + 3 * i, i_e)
        tl.store(p_tiles + 3 * i + 1, first)
        tl.store(p_tiles + 3 * i + 2, tl.minimum(first + TILE, end))
    if i_e == E - 1:
        for i in range(last, tiles):
            for field in tl.static_range(3):
                tl.store(p_tiles + 3 * i + field, 0)
    if start == end:
        return
    at = start
    for i_p in range(0, P, BLOCK_P):
        b_ids = tl.load(p_ids + i_p + o_p, mask=i_p + o_p < P, other=-1)
        b_own = (b_ids == i_e).to(tl.int32)
        b_place = at + tl.cumsum(b_own, 0) - 1  # [BLOCK_P]
        tl.store(p_tokens + b_place, (i_p + o_p) // k, mask=b_own != 0)
        tl.store(p_experts + b_place, b_ids, mask=b_own != 0)
        tl.store(p_places + i_p + o_p, b_place, mask=b_own != 0)
        at += tl.sum(b_own, 0)


@triton.jit(do_not_specialize_on_alignment=["p_tiles", "p_rows"])
def grouped_kernel(
    p_x,  # [rows, K]
    p_rows,  # int32 [P]: the row of x of each place, or None: they are the same
    p_w,  # [E, N, K]
    p_bias,  # [E, N], or None
    p_out,  # [P, N]
    p_tiles,  # int32 [tiles, 3]
    N,
    K,
    stride_x,
    stride_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out[p] = x[row(p)] w[expert(p)]^T + bias[expert(p)]. One program per (tile of columns, tile of places).

    What a place gives does not depend on the others of its tile. All columns of a tile of places follow one
    another, so that its rows of x are read from memory once, and an expert's weights for a few tiles together.
    """
    p_tile = p_tiles + 3 * tl.program_id(1)
    start, end = tl.load(p_tile + 1), tl.load(p_tile + 2)
    if start >= end:
        return
    expert = tl.load(p_tile).to(tl.int64)
    o_p = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_p = o_p < end
    o_x = o_p if p_rows is None else tl.load(p_rows + o_p, mask=m_p, other=0)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_n = o_n < N
    p_x_row = p_x + o_x.to(tl.int64)[:, None] * stride_x
    p_w_row = p_w + (expert * N + o_n.to(tl.int64))[None, :] * K
    b_out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        m_k = o_k < K
        b_x = tl.load(p_x_row + o_k[None, :], mask=m_p[:, None] & m_k[None, :], other=0.0)
        b_w = tl.load(p_w_row + o_k[:, None], mask=m_n[None, :] & m_k[:, None], other=0.0)
        if UPCAST:
            b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
        b_out = tl.dot(b_x, b_w, b_out, input_precision="ieee")
    if p_bias is not None:
        b_out += tl.load(p_bias + expert * N + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_to = p_out + o_p.to(tl.int64)[:, None] * stride_out + o_n[None, :]
    tl.store(p_to, b_out.to(p_out.dtype.element_ty), mask=m_p[:, None] & m_n[None, :])


@triton.jit
def clamped_kernel(
    p_gate_up,  # [P, 2 * I]
    p_out,  # [P, I]
    I,  # noqa: E741 - as the papers name it
    stride_gate_up,
    stride_out,
    alpha,
    limit,
    BLOCK: tl.constexpr,
):
    """out = (up + 1) * gate * sigmoid(alpha * gate), both clamped. One program per (row, tile of columns)."""
    i_p = tl.program_id(0).to(tl.int64)
    o_i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_i = o_i < I
    p_gate = p_gate_up + i_p * stride_gate_up + o_i
    b_gate = tl.minimum(tl.load(p_gate, mask=m_i, other=0.0).to(tl.float32), limit)
    b_up = tl.load(p_gate + I, mask=m_i, other=0.0).to(tl.float32)
    b_up = tl.minimum(tl.maximum(b_up, -limit), limit)
    b_out = (b_up + 1.0) * b_gate / (1.0 + tl.exp(-alpha * b_gate))
    tl.store(p_out + i_p * stride_out + o_i, b_out.to(p_out.dtype.element_ty), mask=m_i)


@triton.jit(do_not_specialize=["k"])
def combine_kernel(
    p_y,  # [P, N]
    p_places,  # int32 [T, k]
    p_weights,  # fp32 [T, k]
    p_out,  # [T, N]
    N,
    k,
    stride_y,
    stride_out,
    BLOCK: tl.constexpr,
):
    """out[t] = sum over j of weights[t, j] * y[place(t, j)], in the order of j and with one rounding."""
    i_t = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_n = o_n < N
    b_out = tl.zeros([BLOCK], tl.float32)
    for j in range(k):
        place = tl.load(p_places + i_t * k + j).to(tl.int64)
        weight = tl.load(p_weights + i_t * k + j)
        b_out += weight * tl.load(p_y + place * stride_y + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_out + i_t * stride_out + o_n, b_out.to(p_out.dtype.element_ty), mask=m_n)


@triton.jit(
    do_not_specialize=["nobody"],
    do_not_specialize_on_alignment=["p_seg_start", "p_seg_slot", "p_pass", "p_num_runs"],
)
def slots_kernel(
    p_token_ids,  # int32 [entries of the step]
    p_seg_start,  # int32 [segments + 1]
    p_seg_slot,  # int32 [segments]
    p_pass,  # int32 [2]: the first segment of this pass, and the first behind it
    p_num_runs,  # int32 [1]: segments with those of the base, where all tokens are in one; or None
    p_entry_scales,  # fp32 [entries of the step], or None
    p_slots,  # int32 [T]
    p_scales,  # fp32 [T], or None
    nobody,
    BLOCK: tl.constexpr,
):
    """slots[token] = its adapter's slot in one pass, of tokens in segments, and scales its scale.

    The base's is nobody's. One program per segment of the pass.
    """
    i_s = tl.load(p_pass) + tl.program_id(0)
    if i_s >= tl.load(p_pass + 1 if p_num_runs is None else p_num_runs):
        return
    start, end, slot = tl.load(p_seg_start + i_s), tl.load(p_seg_start + i_s + 1), tl.load(p_seg_slot + i_s)
    slot = tl.where(slot < 0, nobody, slot)
    for i in range(start, end, BLOCK):
        o_entry = i + tl.arange(0, BLOCK)
        o_t = tl.load(p_token_ids + o_entry, mask=o_entry < end, other=0)
        tl.store(p_slots + o_t, tl.zeros([BLOCK], tl.int32) + slot, mask=o_entry < end)
        if p_entry_scales is not None:
            tl.store(p_scales + o_t, tl.load(p_entry_scales + o_entry, mask=o_entry < end), mask=o_entry < end)


@triton.jit
def starts_of(o_p, P, p_tokens, p_experts, p_slots, TILE: tl.constexpr):
    """(1 or 0, slot, expert) of places: whether a segment begins there, and whose."""
    m_p = o_p < P
    b_slot = tl.load(p_slots + tl.load(p_tokens + o_p, mask=m_p, other=0))
    b_expert = tl.load(p_experts + o_p, mask=m_p, other=0)
    m_before = m_p & (o_p > 0)
    b_before = tl.load(p_slots + tl.load(p_tokens + o_p - 1, mask=m_before, other=0))
    b_other = tl.load(p_experts + o_p - 1, mask=m_before, other=0)
    b_new = (b_slot != b_before) | (b_expert != b_other) | (o_p % TILE == 0)
    return (b_new & m_p).to(tl.int32), b_slot, b_expert


@triton.jit(do_not_specialize=["P"])
def starts_kernel(
    p_tokens,  # int32 [P]
    p_experts,  # int32 [P]
    p_slots,  # int32 [T]
    p_counts,  # int32 [programs]
    P,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SPAN: tl.constexpr,
):
    """counts[i] = segments that begin in a span of places. One program per span."""
    first = tl.program_id(0) * SPAN
    b_count = tl.zeros([BLOCK_P], tl.int32)
    for i_p in range(first, tl.minimum(first + SPAN, P), BLOCK_P):
        b_new, _slot, _expert = starts_of(i_p + tl.arange(0, BLOCK_P), P, p_tokens, p_experts, p_slots, TILE)
        b_count += b_new
    tl.store(p_counts + tl.program_id(0), tl.sum(b_count, 0))


@triton.jit(do_not_specialize=["P", "slot_stride", "expert_stride"])
def segments_kernel(
    p_tokens,  # int32 [P]
    p_experts,  # int32 [P]
    p_slots,  # int32 [T]
    p_scales,  # fp32 [T], or None
    p_counts,  # int32 [programs] of starts_kernel; None: there is one program
    p_token_ids,  # int32 [P]
    p_seg_start,  # int32 [segments + 1]
    p_seg_slot,  # int32 [segments]
    p_place_scales,  # fp32 [P], or None
    p_pass_start,  # int32 [3]: 0, segments of the step, P
    P,
    slot_stride,
    expert_stride,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Segments of places with one adapter and one expert, which end at multiples of TILE too.

    One program per span of places; each counts the segments of those before it.
    """
    o = tl.arange(0, BLOCK_P)
    i_span, at = tl.program_id(0), 0
    if p_counts is not None:
        for i in range(0, i_span, BLOCK_P):
            at += tl.sum(tl.load(p_counts + i + o, mask=i + o < i_span, other=0), 0)
    last = tl.minimum((i_span + 1) * SPAN, P)
    for i_p in range(i_span * SPAN, last, BLOCK_P):
        o_p = i_p + o
        m_p = o_p < P
        tl.store(p_token_ids + o_p, o_p, mask=m_p)
        b_count, b_slot, b_expert = starts_of(o_p, P, p_tokens, p_experts, p_slots, TILE)
        if p_scales is not None:
            b_scale = tl.load(p_scales + tl.load(p_tokens + o_p, mask=m_p, other=0))
            tl.store(p_place_scales + o_p, b_scale, mask=m_p)
        b_index = at + tl.cumsum(b_count, 0) - 1
        tl.store(p_seg_start + b_index, o_p, mask=b_count != 0)
        tl.store(p_seg_slot + b_index, b_slot * slot_stride + b_expert * expert_stride, mask=b_count != 0)
        at += tl.sum(b_count, 0)
    if last == P:
        tl.store(p_seg_start + at, P)
        tl.store(p_pass_start, 0)
        tl.store(p_pass_start + 1, at)
        tl.store(p_pass_start + 2, P)
