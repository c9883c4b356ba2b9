"""The kernels. T rows of hidden states, I columns of a gate, V tokens."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# The bodies are Triton, not Python: only the compiler knows their types.

import triton
import triton.language as tl

from inference_service.engine.kernels.rounded.triton_kernels import store_fp8
from inference_service.engine.kernels.sgmv.triton_kernels import (
    PLANE_SCALARS,
    SEGMENT_POINTERS,
    columns_of_tile,
    run_of,
    shared_tiles,
    slice_of_tile,
    with_update,
)

INTERPRETED: bool = triton.knobs.runtime.interpret
"""True if the kernels below were made for the interpreter."""


@triton.jit
def _normed(b_x, p_weight, o_d, m_d, dim, eps, offset):
    """x / rms(x) * (offset + weight) in float32; columns beyond dim are 0 in x."""
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    return b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=0) / dim + eps) * (b_weight + offset)


@triton.jit
def norm_kernel(
    p_hidden,  # [T, dim]
    p_delta,  # [T, dim], or None
    p_delta_weight,  # [dim], or None
    p_weight,  # [dim]
    p_bias,  # [dim], or None
    p_out,  # [T, dim]
    p_values,  # fp8 [T, dim], or None
    p_scales,  # fp32 [T], or None
    dim,
    stride_hidden,
    stride_delta,
    stride_out,
    eps,
    offset,
    CENTRED: tl.constexpr,  # whether the mean of a row is subtracted
    BLOCK: tl.constexpr,
):
    """hidden += delta, or its norm; out = norm(hidden), rounded to 8 bits too. One program per row."""
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)  # [BLOCK]
    m_d = o_d < dim
    p_row = p_hidden + row * stride_hidden + o_d
    b_hidden = tl.load(p_row, mask=m_d, other=0.0).to(tl.float32)
    if p_delta is not None:
        b_delta = tl.load(p_delta + row * stride_delta + o_d, mask=m_d, other=0.0).to(tl.float32)
        if p_delta_weight is not None:
            b_delta = _normed(b_delta, p_delta_weight, o_d, m_d, dim, eps, offset)
            b_delta = b_delta.to(p_delta.dtype.element_ty).to(tl.float32)
        b_sum = (b_hidden + b_delta).to(p_hidden.dtype.element_ty)
        tl.store(p_row, b_sum, mask=m_d)
        b_hidden = b_sum.to(tl.float32)
    if CENTRED:
        b_hidden = tl.where(m_d, b_hidden - tl.sum(b_hidden, axis=0) / dim, 0.0)
    b_out = _normed(b_hidden, p_weight, o_d, m_d, dim, eps, offset)
    if p_bias is not None:
        b_out += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_out = b_out.to(p_out.dtype.element_ty)
    tl.store(p_out + row * stride_out + o_d, b_out, mask=m_d)
    if p_values is not None:
        store_fp8(p_values, p_scales, row, o_d, m_d, b_out.to(tl.float32), dim)


@triton.jit
def _active(b_x, ACTIVATION: tl.constexpr):
    """The activation in float32."""
    if ACTIVATION == "gelu":
        b_part = 0.5 + 0.5 * tl.erf(b_x * 0.7071067811865476)
    else:
        b_slope = b_x
        if ACTIVATION == "gelu_tanh":
            # (1 + tanh(u)) / 2 is the sigmoid of 2 u, and exp may overflow to infinity there; 2 * sqrt(2 / pi).
            b_slope = 1.5957691216057308 * (b_x + 0.044715 * b_x * b_x * b_x)
        b_part = 1.0 / (1.0 + tl.exp(-b_slope))
    return b_x * b_part


@triton.jit
def activated_kernel(
    p_gate_up,  # [T, HALVES * I]
    p_out,  # [T, I]
    p_values,  # fp8 [T, I], or None
    p_scales,  # fp32 [T], or None
    I,  # noqa: E741 - as the papers name it
    stride_gate_up,
    stride_out,
    HALVES: tl.constexpr,  # 1: there is no up
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = activation(gate) * up, each rounded as torch does; a tile that is a row is rounded to 8 bits too.

    One program per (row, tile of columns).
    """
    i_t = tl.program_id(0).to(tl.int64)
    o_i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_i = o_i < I
    p_gate = p_gate_up + i_t * stride_gate_up + o_i
    b_gate = tl.load(p_gate, mask=m_i, other=0.0).to(tl.float32)
    b_out = _active(b_gate, ACTIVATION).to(p_out.dtype.element_ty)
    if HALVES == 2:
        b_up = tl.load(p_gate + I, mask=m_i, other=0.0).to(tl.float32)
        b_out = (b_out.to(tl.float32) * b_up).to(p_out.dtype.element_ty)
    tl.store(p_out + i_t * stride_out + o_i, b_out, mask=m_i)
    if p_values is not None:
        store_fp8(p_values, p_scales, i_t, o_i, m_i, b_out.to(tl.float32), I)


@triton.jit
def _activated_tile(
    i_s, i_n, width, tiles, p_gate_up, p_out, stride_gate_up, stride_out, p_y, p_planes, p_b, p_vectors,
    p_table, p_token_ids, p_seg_start, p_seg_slot, p_end, stride_table, stride_y, OFFSETS: tl.constexpr,
    SIZES: tl.constexpr, ALIGNMENT: tl.constexpr, N_SLICES: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, UPCAST: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of columns of one run of rows; see ``activated_update_kernel``."""
    p_slot, adapted, start, end = run_of(i_s, p_table, p_seg_start, p_seg_slot, stride_table)
    gate_rank, of_gate, gate_vectors, _size, _offset, gate_column, _tile = slice_of_tile(
        i_n, p_slot, OFFSETS, SIZES, ALIGNMENT, N_SLICES, width
    )
    if N_SLICES == 2:
        up_rank, of_up, up_vectors, _size, _offset, up_column, _tile = slice_of_tile(
            i_n + tiles, p_slot, OFFSETS, SIZES, ALIGNMENT, N_SLICES, width
        )
    planes, stride_y_plane = tl.load(p_planes), tl.load(p_end + 1).to(tl.int64) * stride_y
    o_n, m_n = columns_of_tile(i_n, width, SIZES[0], BLOCK_N)  # in either slice
    for i_t in tl.range(start, end, BLOCK_T, num_stages=1):
        o_p = i_t + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        m_p = o_p < end
        o_t = tl.load(p_token_ids + o_p, mask=m_p, other=0).to(tl.int64)[:, None]  # [BLOCK_T, 1]
        p_row = p_gate_up + o_t * stride_gate_up
        b_gate = with_update(
            p_row, adapted, gate_rank, of_gate, gate_vectors, SIZES[0], gate_column, o_n, m_n, o_p, m_p, planes,
            p_y, p_b, p_vectors, stride_y_plane, stride_y, PLANES, BLOCK_T, BLOCK_R, BLOCK_N, UPCAST,
        )  # fmt: skip
        b_out = _active(b_gate, ACTIVATION).to(p_out.dtype.element_ty)
        if N_SLICES == 2:
            b_up = with_update(
                p_row + SIZES[0], adapted, up_rank, of_up, up_vectors, SIZES[0], up_column, o_n, m_n, o_p, m_p,
                planes, p_y, p_b, p_vectors, stride_y_plane, stride_y, PLANES, BLOCK_T, BLOCK_R, BLOCK_N,
                UPCAST,
            )  # fmt: skip
            b_out = (b_out.to(tl.float32) * b_up).to(p_out.dtype.element_ty)
        tl.store(p_out + o_t * stride_out + o_n[None, :], b_out, mask=m_p[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=PLANE_SCALARS, do_not_specialize_on_alignment=SEGMENT_POINTERS)
def activated_update_kernel(
    p_gate_up,  # [T, N_SLICES * I], of the base alone
    p_out,  # [T, I]
    stride_gate_up,
    stride_out,
    p_num_runs,  # int32 [1]: segments of all rows
    p_y,  # the others as expand_kernel has them
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
    SIZES: tl.constexpr,  # (I, I), or (I,)
    ALIGNMENT: tl.constexpr,
    N_SLICES: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STEP_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """As ``activated_kernel``, of gate and up with the adapters' updates, which are written nowhere.

    The programs share the (runs of rows, tiles of columns).
    """
    runs = tl.load(p_num_runs)
    width, tiles = shared_tiles(runs, SIZES, 1, STEP_N, BLOCK_N)
    for i in tl.range(tl.program_id(0), runs * tiles, tl.num_programs(0), num_stages=1):
        _activated_tile(
            i // tiles, i % tiles, width, tiles, p_gate_up, p_out, stride_gate_up, stride_out, p_y, p_planes,
            p_b, p_vectors, p_table, p_token_ids, p_seg_start, p_seg_slot, p_end, stride_table, stride_y,
            OFFSETS, SIZES, ALIGNMENT, N_SLICES, PLANES, BLOCK_T, BLOCK_R, UPCAST, ACTIVATION, BLOCK_N,
        )  # fmt: skip


@triton.jit
def embed_kernel(
    p_tokens,  # int [T]
    p_table,  # [V, dim]
    p_out,  # [T, dim]
    dim,
    stride_table,
    stride_out,
    scale,
    BLOCK: tl.constexpr,
):
    """out[t] = table[tokens[t]] * scale. One program per (row, tile of columns)."""
    i_t = tl.program_id(0).to(tl.int64)
    token = tl.load(p_tokens + i_t).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_d = o_d < dim
    b_out = tl.load(p_table + token * stride_table + o_d, mask=m_d, other=0.0).to(tl.float32) * scale
    tl.store(p_out + i_t * stride_out + o_d, b_out.to(p_out.dtype.element_ty), mask=m_d)


@triton.jit
def softcap_kernel(
    p_logits,  # [N, V]
    V,
    stride_logits,
    cap,
    BLOCK: tl.constexpr,
):
    """logits = tanh(logits / cap) * cap in place, with one rounding. One program per (row, tile of columns)."""
    o_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_v = o_v < V
    p_tile = p_logits + tl.program_id(0).to(tl.int64) * stride_logits + o_v
    b_x = tl.load(p_tile, mask=m_v, other=0.0).to(tl.float32) / cap
    # Near 0 the form with exp loses digits to the 1; a series to x^9 is exact to 1e-8 below 1/4.
    b_square = b_x * b_x
    b_series = b_square * (17.0 / 315 - b_square * (62.0 / 2835))
    b_series = b_x * (1.0 - b_square * (1.0 / 3 - b_square * (2.0 / 15) + b_square * b_series))
    b_far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(b_x)))
    b_tanh = tl.where(tl.abs(b_x) < 0.25, b_series, tl.where(b_x < 0, -b_far, b_far))
    tl.store(p_tile, (b_tanh * cap).to(p_logits.dtype.element_ty), mask=m_v)
