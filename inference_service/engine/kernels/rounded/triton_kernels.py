"""The kernels. T rows of K values, N columns; a weight of 4 bits has two values a byte, GROUP values a scale.

Of each 32 values of 4 bits, the first 16 are the lower halves of 16 bytes, the others the upper ones: both
halves of a tile of bytes are multiplied with values of x that lie side by side.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# The bodies are Triton, not Python: only the compiler knows their types.

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""True if the kernels below were made for the interpreter, which computes bf16 wrongly without UPCAST."""
OLD: bool = triton.__version__.startswith("3.5.")
"""True for a Triton that fails to compile the product of 33 to 64 rows and 4 bits for sm_100."""
HALF = tl.constexpr(16)
"""Values of 4 bits that lie in the lower halves of bytes side by side."""


@triton.jit
def _values(o_b):
    """Return the values that the lower halves of bytes are; the upper ones are HALF behind."""
    return o_b // HALF * (2 * HALF) + o_b % HALF


@triton.jit
def _widened(b_numbers, p_scale, p_zero, m_scale, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """Return (numbers - zero point) * scale, rounded once to DTYPE."""
    b_wide = b_numbers.to(tl.float32)
    if p_zero is not None:
        b_wide -= tl.load(p_zero, mask=m_scale, other=0).to(tl.float32)
    b_wide *= tl.load(p_scale, mask=m_scale, other=0.0).to(tl.float32)
    b_wide = b_wide.to(DTYPE)
    return b_wide.to(tl.float32) if UPCAST else b_wide


@triton.jit
def product_kernel(
    p_x,  # [T, K]
    p_values,  # int8 [N, K], or [N, K / 2] of 4 bits
    p_scales,  # bf16 or fp32 [N, K / GROUP]
    p_zeros,  # int8 [N, K / GROUP], or None
    p_bias,  # [N], or None
    p_out,  # [T, N], written
    rows,
    columns,
    stride_x,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,  # bytes of a row at a time
    UPCAST: tl.constexpr,
):
    """x W^T + b. One program per (tile of columns, tile of rows), which sums over K in order."""
    i_n, i_m = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = p_x.dtype.element_ty
    BYTES: tl.constexpr = K * BITS // 8
    GROUPS: tl.constexpr = K // GROUP
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n, m_m = (o_n < columns)[None, :], (o_m < rows)[:, None]
    p_row = p_x + o_m.to(tl.int64)[:, None] * stride_x
    p_column = p_values + o_n.to(tl.int64)[None, :] * BYTES
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_b in range(0, BYTES, BLOCK_B):
        o_b = i_b + tl.arange(0, BLOCK_B)
        m_b = o_b < BYTES
        m_w = m_b[:, None] & m_n
        b_w = tl.load(p_column + o_b[:, None], mask=m_w, other=0)  # [BLOCK_B, BLOCK_N]
        o_k = o_b
        if BITS == 4:
            o_k = _values(o_b)
        b_x = tl.load(p_row + o_k[None, :], mask=m_m & m_b[None, :], other=0.0)  # [BLOCK_M, BLOCK_B]
        if UPCAST:
            b_x = b_x.to(tl.float32)
        o_scale = o_n.to(tl.int64)[None, :] * GROUPS + (o_k // GROUP)[:, None]
        p_zero = None
        if p_zeros is not None:
            p_zero = p_zeros + o_scale
        if BITS == 4:
            b_two = b_w.to(tl.int32)
            b_low = _widened(b_two << 28 >> 28, p_scales + o_scale, p_zero, m_w, dtype, UPCAST)
            b_acc = tl.dot(b_x, b_low, b_acc, input_precision="ieee")
            b_x = tl.load(p_row + o_k[None, :] + HALF, mask=m_m & m_b[None, :], other=0.0)
            if UPCAST:
                b_x = b_x.to(tl.float32)
            b_w = _widened(b_two >> 4, p_scales + o_scale, p_zero, m_w, dtype, UPCAST)
        elif GROUP < K:
            b_w = _widened(b_w, p_scales + o_scale, p_zero, m_w, dtype, UPCAST)
        else:  # one scale for a column, which its sum is multiplied with
            b_w = b_w.to(tl.float32 if UPCAST else dtype)
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision="ieee")
    if BITS == 8 and GROUP == K:
        b_acc *= tl.load(p_scales + o_n, mask=o_n < columns, other=0.0).to(tl.float32)[None, :]
    if p_bias is not None:
        b_acc += tl.load(p_bias + o_n, mask=o_n < columns, other=0.0).to(tl.float32)[None, :]
    p_result = p_out + o_m.to(tl.int64)[:, None] * columns + o_n[None, :]
    tl.store(p_result, b_acc.to(dtype), mask=m_m & m_n)


@triton.jit
def widen_kernel(
    p_values,  # as in product_kernel
    p_scales,
    p_zeros,
    p_out,  # [N, K], written
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The weight, widened. One program per (column, tile of its bytes)."""
    i_n = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = p_out.dtype.element_ty
    BYTES: tl.constexpr = K * BITS // 8
    GROUPS: tl.constexpr = K // GROUP
    o_b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_b = o_b < BYTES
    b_w = tl.load(p_values + i_n * BYTES + o_b, mask=m_b, other=0)
    o_k = o_b
    if BITS == 4:
        o_k = _values(o_b)
    o_scale = i_n * GROUPS + o_k // GROUP
    p_zero = None
    if p_zeros is not None:
        p_zero = p_zeros + o_scale
    p_row = p_out + i_n * K + o_k
    if BITS == 4:
        b_two = b_w.to(tl.int32)
        b_low = _widened(b_two << 28 >> 28, p_scales + o_scale, p_zero, m_b, dtype, False)
        b_high = _widened(b_two >> 4, p_scales + o_scale, p_zero, m_b, dtype, False)
        tl.store(p_row, b_low, mask=m_b)
        tl.store(p_row + HALF, b_high, mask=m_b)
    else:
        tl.store(p_row, _widened(b_w, p_scales + o_scale, p_zero, m_b, dtype, False), mask=m_b)


@triton.jit
def store_fp8(p_values, p_scales, i_t, o_k, m_k, b_x, K):
    """Store a row [BLOCK] in 8 bits of floating point, and the scale that it is multiplied with; 0 beyond K."""
    scale = tl.maximum(tl.max(tl.abs(b_x), axis=0), 1e-12) / 448.0
    b_bits = tl.minimum(tl.maximum(b_x / scale, -448.0), 448.0).to(tl.int32, bitcast=True)
    # To four bits, nearest and even, before the cast: the interpreter's loses what it carries.
    b_x = ((b_bits + 0x7FFFF + ((b_bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    tl.store(p_values + i_t * K + o_k, b_x.to(p_values.dtype.element_ty), mask=m_k)
    tl.store(p_scales + i_t, scale)


@triton.jit
def round_rows_kernel(
    p_x,  # [T, K]
    p_values,  # fp8 [T, K], written
    p_scales,  # fp32 [T], written
    K: tl.constexpr,
    stride_x,
    BLOCK: tl.constexpr,  # at least K
):
    """Rows as `store_fp8` stores them. One program per row."""
    i_t = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + i_t * stride_x + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    store_fp8(p_values, p_scales, i_t, o_k, o_k < K, b_x, K)
