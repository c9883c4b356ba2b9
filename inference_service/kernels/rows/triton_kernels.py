"""The kernels. T rows of hidden states, N rows that are wanted, I columns of a gate, V tokens."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# The bodies are Triton, not Python: only the compiler knows their types.

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""True if the kernels below were made for the interpreter."""


@triton.jit
def _normed(b_x, p_weight, o_d, m_d, dim, eps, offset):
    """x / rms(x) * (offset + weight) in float32; columns beyond dim are 0 in x."""
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    return b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=0) / dim + eps) * (b_weight + offset)


@triton.jit
def rms_norm_kernel(
    p_hidden,  # [T, dim]
    p_delta,  # [T, dim], or None
    p_delta_weight,  # [dim], or None
    p_weight,  # [dim]
    p_rows,  # int [N], or None
    p_out,  # [N, dim]
    dim,
    stride_hidden,
    stride_delta,
    stride_out,
    eps,
    offset,
    BLOCK: tl.constexpr,
):
    """hidden += delta, or its norm; out[n] = norm(hidden[rows[n]]). One program per row of out.

    With chosen rows, hidden is not written: two programs may read the same row.
    """
    i_n = tl.program_id(0).to(tl.int64)
    row = i_n if p_rows is None else tl.load(p_rows + i_n).to(tl.int64)
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
        if p_rows is None:
            tl.store(p_row, b_sum, mask=m_d)
        b_hidden = b_sum.to(tl.float32)
    b_out = _normed(b_hidden, p_weight, o_d, m_d, dim, eps, offset)
    tl.store(p_out + i_n * stride_out + o_d, b_out.to(p_out.dtype.element_ty), mask=m_d)


@triton.jit
def gated_kernel(
    p_gate_up,  # [T, 2 * I]
    p_out,  # [T, I]
    I,  # noqa: E741 - as the papers name it
    stride_gate_up,
    stride_out,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = activation(gate) * up, each rounded as torch does. One program per (row, tile of columns)."""
    i_t = tl.program_id(0).to(tl.int64)
    o_i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_i = o_i < I
    p_gate = p_gate_up + i_t * stride_gate_up + o_i
    b_gate = tl.load(p_gate, mask=m_i, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate + I, mask=m_i, other=0.0).to(tl.float32)
    b_slope = b_gate
    if GELU:
        # (1 + tanh(u)) / 2 is the sigmoid of 2 u, and exp may overflow to infinity there; 2 * sqrt(2 / pi).
        b_slope = 1.5957691216057308 * (b_gate + 0.044715 * b_gate * b_gate * b_gate)
    b_active = b_gate / (1.0 + tl.exp(-b_slope))
    b_out = b_active.to(p_out.dtype.element_ty).to(tl.float32) * b_up
    tl.store(p_out + i_t * stride_out + o_i, b_out.to(p_out.dtype.element_ty), mask=m_i)


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
