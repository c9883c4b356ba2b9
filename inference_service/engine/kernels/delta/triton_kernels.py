"""The kernels. T rows, H value heads of which GROUP share a head of keys, K of a key, V of a value.

A program of a chunk takes what its state was before the chunk, and leaves what it is behind it; programs of
chunks or tiles that are not there end at once. Sums are fp32, and results are rounded where torch would round.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# The bodies are Triton, not Python: only the compiler knows their types.

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""True if the kernels below were made for the interpreter, which computes bf16 wrongly without UPCAST."""


@triton.jit
def _sigmoid(b_x):
    """1 / (1 + exp(-x)), without infinity."""
    b_e = tl.exp(-tl.abs(b_x))
    return tl.where(b_x < 0, b_e, 1.0) / (1.0 + b_e)


@triton.jit
def _softplus(b_x):
    """log(1 + exp(x)), without infinity and to the last digits: log(1 + e) is 2 atanh(e / (2 + e))."""
    b_e = tl.exp(-tl.abs(b_x))
    b_s = b_e / (2.0 + b_e)  # at most 1/3
    b_square = b_s * b_s
    b_series = 1.0 / 9 + b_square * (1.0 / 11 + b_square * (1.0 / 13))
    b_series = 1.0 + b_square * (1.0 / 3 + b_square * (1.0 / 5 + b_square * (1.0 / 7 + b_square * b_series)))
    return tl.maximum(b_x, 0.0) + 2.0 * b_s * b_series


@triton.jit
def conv_kernel(
    p_qkv,  # [T, channels]
    p_weight,  # [WIDTH, channels]
    p_states,  # [slots, WIDTH - 1, channels], read and written
    p_out,  # [T, channels], written
    p_chunks,  # int32 [chunks, 4]
    channels,
    stride_qkv,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = silu(convolution of the rows); the chunk's last rows to the states. One program per
    (chunk, tile of channels), so that none reads a state that another has written."""
    p_chunk = p_chunks + tl.program_id(0) * 4
    row, length = tl.load(p_chunk).to(tl.int64), tl.load(p_chunk + 1)
    slot, fresh = tl.load(p_chunk + 2).to(tl.int64), tl.load(p_chunk + 3)
    if length > 0:
        dtype = p_out.dtype.element_ty
        o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        m_c = (o_c < channels)[None, :]
        m_old = (o_c < channels * (1 - fresh))[None, :]  # where it begins, there is nothing before the chunk
        p_rows = p_qkv + row * stride_qkv + o_c[None, :]
        p_state = p_states + slot * (WIDTH - 1) * channels + o_c[None, :]
        for i_t in range(0, length, BLOCK_T):
            o_t = i_t + tl.arange(0, BLOCK_T)  # [BLOCK_T] within the chunk
            b_sum = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
            for i_w in tl.static_range(WIDTH):
                o_from = (o_t + i_w - (WIDTH - 1))[:, None]  # below 0: before the chunk
                m_rows = m_c & (o_from >= 0) & (o_from < length)
                m_state = m_old & (o_from < 0)
                b_x = tl.load(p_rows + o_from.to(tl.int64) * stride_qkv, mask=m_rows, other=0.0)
                b_before = tl.load(p_state + (o_from + (WIDTH - 1)) * channels, mask=m_state, other=0.0)
                b_weight = tl.load(p_weight + i_w * channels + o_c[None, :], mask=m_c, other=0.0)
                b_sum += (b_x.to(tl.float32) + b_before.to(tl.float32)) * b_weight.to(tl.float32)
            b_sum = b_sum.to(dtype).to(tl.float32)
            p_to = p_out + (row + o_t[:, None]) * channels + o_c[None, :]
            tl.store(p_to, (b_sum * _sigmoid(b_sum)).to(dtype), mask=m_c & (o_t < length)[:, None])
        o_w = tl.arange(0, BLOCK_W)[:, None]  # [BLOCK_W, 1]
        o_from = length - (WIDTH - 1) + o_w
        m_w = m_c & (o_w < WIDTH - 1)
        b_x = tl.load(p_rows + o_from.to(tl.int64) * stride_qkv, mask=m_w & (o_from >= 0), other=0.0)
        m_state = m_old & (o_w < WIDTH - 1) & (o_from < 0)
        b_before = tl.load(p_state + (o_from + (WIDTH - 1)) * channels, mask=m_state, other=0.0)
        tl.debug_barrier()  # what other threads still read is written below
        tl.store(p_state + o_w * channels, tl.where(o_from >= 0, b_x, b_before), mask=m_w)


@triton.jit
def _gated(b_out, p_norm, p_z, o_v, m_v, m_z, eps, V: tl.constexpr, dtype: tl.constexpr):
    """norm(out) * silu(z) of rows [..., BLOCK_V], whose columns beyond V are 0."""
    b_out = b_out.to(dtype).to(tl.float32)
    b_rms = tl.rsqrt(tl.sum(b_out * b_out, axis=1) / V + eps)
    b_norm = tl.load(p_norm + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_normed = (b_out * b_rms[:, None]).to(dtype).to(tl.float32) * b_norm[None, :]
    b_z = tl.load(p_z, mask=m_z, other=0.0).to(tl.float32)
    return (b_normed.to(dtype).to(tl.float32) * (b_z * _sigmoid(b_z))).to(dtype)


@triton.jit
def step_kernel(
    p_x,  # [T, channels] of `conv_kernel`
    p_z,  # [T, H * V]
    p_b,  # [T, H]
    p_a,  # [T, H]
    p_decay,  # fp32 [H]
    p_dt_bias,  # fp32 [H]
    p_norm,  # [V]
    p_states,  # fp32 [slots, H, K, V], read and written
    p_out,  # [T, H * V], written
    p_chunks,  # int32 [chunks, 4]
    channels,
    stride_z,
    stride_b,
    stride_a,
    eps,
    scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    ALONE: tl.constexpr,  # whether all chunks have one row: those that are not there are rows of padding
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Chunks of one row: out = norm(S^T q) * silu(z), and their states. One program per (chunk, head)."""
    p_chunk, i_h = p_chunks + tl.program_id(0) * 4, tl.program_id(1)
    row, length = tl.load(p_chunk).to(tl.int64), tl.load(p_chunk + 1)
    slot, fresh = tl.load(p_chunk + 2).to(tl.int64), tl.load(p_chunk + 3)
    dtype = p_out.dtype.element_ty
    o_k, o_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    m_k, m_v = o_k < K, o_v < V
    o_z = i_h * V + o_v
    if length == 1:
        p_row = p_x + row * channels
        b_q = tl.load(p_row + i_h // GROUP * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_k = tl.load(p_row + (H // GROUP + i_h // GROUP) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(p_row + 2 * (H // GROUP) * K + o_z, mask=m_v, other=0.0).to(tl.float32)
        b_q = b_q * tl.rsqrt(tl.sum(b_q * b_q, axis=0) + 1e-6) * scale
        b_k = b_k * tl.rsqrt(tl.sum(b_k * b_k, axis=0) + 1e-6)
        b_beta = _sigmoid(tl.load(p_b + row * stride_b + i_h).to(tl.float32)).to(dtype).to(tl.float32)
        b_a = tl.load(p_a + row * stride_a + i_h).to(tl.float32) + tl.load(p_dt_bias + i_h)
        b_left = tl.exp(tl.load(p_decay + i_h) * _softplus(b_a))

        p_state = p_states + (slot * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
        m_state, m_old = m_k[:, None] & m_v[None, :], o_k < K * (1 - fresh)
        b_state = tl.load(p_state, mask=m_state & m_old[:, None], other=0.0) * b_left  # [BLOCK_K, BLOCK_V]
        b_new = (b_v - tl.sum(b_state * b_k[:, None], axis=0)) * b_beta
        b_state += b_k[:, None] * b_new[None, :]
        b_out = tl.sum(b_state * b_q[:, None], axis=0)[None, :]
        tl.store(p_state, b_state, mask=m_state)
        p_gate = p_z + row * stride_z + o_z[None, :]
        b_out = _gated(b_out, p_norm, p_gate, o_v, m_v, m_v[None, :], eps, V, dtype)
        tl.store(p_out + row * H * V + o_z[None, :], b_out, mask=m_v[None, :])
    elif ALONE:
        tl.store(p_out + row * H * V + o_z, tl.zeros([BLOCK_V], dtype), mask=m_v)


@triton.jit
def _inverse(b_below, BLOCK_T: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + below)^-1 of a strictly lower [BLOCK_T, BLOCK_T]: of blocks of two rows, of four, and so on.

    The inverse of [[A, 0], [C, B]] is [[A', 0], [-B' C A', B']]; no power of a block is ever made.
    """
    o_i, o_j = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_T)[None, :]
    b_inverse = tl.where(o_i == o_j, 1.0, 0.0) - tl.where(o_i >> 1 == o_j >> 1, b_below, 0.0)
    for level in range(1, LEVELS):
        m_c = (o_i >> (level + 1) == o_j >> (level + 1)) & (o_i >> level > o_j >> level)
        b_c = tl.dot(tl.where(m_c, b_below, 0.0), b_inverse, input_precision=PRECISION)
        b_inverse -= tl.dot(b_inverse, b_c, input_precision=PRECISION)
    return b_inverse


@triton.jit
def _keys(p_keys, mask, UPCAST: tl.constexpr):
    """Queries or keys [rows, BLOCK_K] as they are, and what makes each row's length 1.

    Products are of what is stored, without a rounding in between, and scaled afterwards.
    """
    b_keys = tl.load(p_keys, mask=mask, other=0.0)
    b_wide = b_keys.to(tl.float32)
    b_scale = tl.rsqrt(tl.sum(b_wide * b_wide, axis=1) + 1e-6)
    return b_wide if UPCAST else b_keys, b_scale


@triton.jit
def _solved(p_from, p_to, b_inverse, b_scale, mask, PRECISION: tl.constexpr):
    """Write the inverse times scaled rows [BLOCK_T, BLOCK_D]."""
    b_rows = tl.load(p_from, mask=mask, other=0.0).to(tl.float32) * b_scale[:, None]
    tl.store(p_to, tl.dot(b_inverse, b_rows, input_precision=PRECISION), mask=mask)


@triton.jit
def prepare_kernel(
    p_x,  # [T, channels] of `conv_kernel`
    p_b,  # [T, H]
    p_a,  # [T, H]
    p_decay,  # fp32 [H]
    p_dt_bias,  # fp32 [H]
    p_total,  # fp32 [T, H], written: sum of g over the rows of the tile up to this one
    p_values,  # fp32 [T, H, V], written: what the rows would write if the state before the tile were 0
    p_reads,  # fp32 [T, H, K], written: what the rows read of that state, to write less
    p_weights,  # fp32 [T, H, BLOCK_T], written: what the rows read of those of the tile
    p_tiles,  # int32 [tiles, 2]
    channels,
    stride_b,
    stride_a,
    scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,  # dimensions of a key or a value that are computed together
    LEVELS: tl.constexpr,  # BLOCK_T is 2 to this power
    PRECISION: tl.constexpr,
    SOLVE_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """All of a tile that does not need the state. One program per (tile, head)."""
    p_tile, i_h = p_tiles + tl.program_id(0) * 2, tl.program_id(1)
    row, rows = tl.load(p_tile).to(tl.int64), tl.load(p_tile + 1)
    if rows > 0:
        dtype = p_x.dtype.element_ty
        o_t, o_k = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
        o_row, m_t = row + o_t, o_t < rows
        m_tk = m_t[:, None] & (o_k < K)[None, :]
        b_a = tl.load(p_a + o_row * stride_a + i_h, mask=m_t, other=0.0).to(tl.float32)
        b_g = tl.load(p_decay + i_h) * _softplus(b_a + tl.load(p_dt_bias + i_h))
        b_total = tl.cumsum(tl.where(m_t, b_g, 0.0), axis=0)  # [BLOCK_T]
        tl.store(p_total + o_row * H + i_h, b_total, mask=m_t)
        b_b = tl.load(p_b + o_row * stride_b + i_h, mask=m_t, other=0.0).to(tl.float32)
        b_beta = tl.where(m_t, _sigmoid(b_b).to(dtype).to(tl.float32), 0.0)

        p_rows = p_x + o_row[:, None] * channels
        p_keys = p_rows + (H // GROUP + i_h // GROUP) * K + o_k[None, :]
        b_k, b_k_scale = _keys(p_keys, m_tk, UPCAST)  # [BLOCK_T, BLOCK_K], [BLOCK_T]
        m_lower = o_t[:, None] >= o_t[None, :]
        b_left = tl.exp(tl.where(m_lower, b_total[:, None] - b_total[None, :], 0.0))
        b_left = tl.where(m_lower, b_left, 0.0) * b_k_scale[None, :]  # [BLOCK_T, BLOCK_T]
        b_below = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_left * (b_beta * b_k_scale)[:, None]
        b_below = tl.where(o_t[:, None] > o_t[None, :], b_below, 0.0)
        b_inverse = _inverse(b_below, BLOCK_T, LEVELS, SOLVE_PRECISION)

        b_q, b_q_scale = _keys(p_rows + i_h // GROUP * K + o_k[None, :], m_tk, UPCAST)
        b_weights = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_weights = b_weights * b_left * (b_q_scale * scale)[:, None]
        o_head = o_row[:, None] * H + i_h
        tl.store(p_weights + o_head * BLOCK_T + o_t[None, :], b_weights, mask=m_t[:, None])
        b_scale = b_k_scale * b_beta * tl.exp(b_total)
        for i_d in range(0, K, BLOCK_D):
            o_d = i_d + tl.arange(0, BLOCK_D)
            p_from = p_rows + (H // GROUP + i_h // GROUP) * K + o_d[None, :]
            p_to = p_reads + o_head * K + o_d[None, :]
            _solved(p_from, p_to, b_inverse, b_scale, m_t[:, None] & (o_d < K)[None, :], PRECISION)
        for i_d in range(0, V, BLOCK_D):
            o_d = i_d + tl.arange(0, BLOCK_D)
            p_from = p_rows + 2 * (H // GROUP) * K + i_h * V + o_d[None, :]
            p_to = p_values + o_head * V + o_d[None, :]
            _solved(p_from, p_to, b_inverse, b_beta, m_t[:, None] & (o_d < V)[None, :], PRECISION)


@triton.jit
def scan_kernel(
    p_x,  # [T, channels] of `conv_kernel`
    p_total,  # fp32 [T, H] of `prepare_kernel`, like the three below
    p_values,  # fp32 [T, H, V]
    p_reads,  # fp32 [T, H, K]
    p_weights,  # fp32 [T, H, BLOCK_T]
    p_states,  # fp32 [slots, H, K, V], read and written
    p_out,  # [T, H * V], written
    p_chunks,  # int32 [chunks, 4]
    channels,
    scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Chunks of several rows, tile by tile: out = S^T q, and the states behind them. One program per
    (chunk, head, BLOCK_V columns of the state)."""
    p_chunk, i_h = p_chunks + tl.program_id(0) * 4, tl.program_id(1)
    row, length = tl.load(p_chunk).to(tl.int64), tl.load(p_chunk + 1)
    slot, fresh = tl.load(p_chunk + 2).to(tl.int64), tl.load(p_chunk + 3)
    if length > 1:
        o_t, o_k = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
        o_v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
        m_k, m_v = o_k < K, o_v < V
        p_state = p_states + (slot * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
        m_state, m_old = m_k[:, None] & m_v[None, :], o_k < K * (1 - fresh)
        b_state = tl.load(p_state, mask=m_state & m_old[:, None], other=0.0)  # [BLOCK_K, BLOCK_V]
        for i_t in range(0, length, BLOCK_T):
            m_t = i_t + o_t < length
            o_row = row + i_t + o_t  # [BLOCK_T]
            m_tk, m_tv = m_t[:, None] & m_k[None, :], m_t[:, None] & m_v[None, :]
            o_head = o_row[:, None] * H + i_h
            b_reads = tl.load(p_reads + o_head * K + o_k[None, :], mask=m_tk, other=0.0)
            b_written = tl.load(p_values + o_head * V + o_v[None, :], mask=m_tv, other=0.0)
            b_written -= tl.dot(b_reads, b_state, input_precision=PRECISION)  # [BLOCK_T, BLOCK_V]

            b_total = tl.load(p_total + o_row * H + i_h, mask=m_t, other=0.0)
            p_q = p_x + o_row[:, None] * channels + i_h // GROUP * K + o_k[None, :]
            b_q = tl.load(p_q, mask=m_tk, other=0.0).to(tl.float32)
            b_scale = tl.rsqrt(tl.sum(b_q * b_q, axis=1) + 1e-6) * scale * tl.exp(b_total)
            b_out = tl.dot(b_q * b_scale[:, None], b_state, input_precision=PRECISION)
            b_weights = tl.load(p_weights + o_head * BLOCK_T + o_t[None, :], mask=m_t[:, None], other=0.0)
            b_out += tl.dot(b_weights, b_written, input_precision=PRECISION)
            p_to = p_out + o_row[:, None] * H * V + i_h * V + o_v[None, :]
            tl.store(p_to, b_out.to(p_out.dtype.element_ty), mask=m_tv)

            last = tl.minimum(length - i_t, BLOCK_T) - 1
            b_last = tl.load(p_total + (row + i_t + last) * H + i_h)
            b_k = tl.load(p_q + (H // GROUP) * K, mask=m_tk, other=0.0).to(tl.float32)
            b_scale = tl.rsqrt(tl.sum(b_k * b_k, axis=1) + 1e-6) * tl.exp(b_last - b_total)
            b_k = tl.trans(b_k * b_scale[:, None])  # [BLOCK_K, BLOCK_T]; beyond the last row 0
            b_state = b_state * tl.exp(b_last) + tl.dot(b_k, b_written, input_precision=PRECISION)
        tl.store(p_state, b_state, mask=m_state)


@triton.jit
def gate_kernel(
    p_out,  # [T, H * V], read and written
    p_z,  # [T, H * V]
    p_norm,  # [V]
    p_tiles,  # int32 [tiles, 2]
    stride_z,
    eps,
    H: tl.constexpr,
    V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """out = norm(out) * silu(z) in place, for the rows of tiles. One program per (tile, head)."""
    p_tile, i_h = p_tiles + tl.program_id(0) * 2, tl.program_id(1)
    first, rows = tl.load(p_tile).to(tl.int64), tl.load(p_tile + 1)
    if rows > 0:
        o_v = tl.arange(0, BLOCK_V)
        for i_t in range(0, rows, BLOCK_T):
            o_t = i_t + tl.arange(0, BLOCK_T)
            m_tv = (o_t < rows)[:, None] & (o_v < V)[None, :]
            p_tile_out = p_out + (first + o_t[:, None]) * H * V + i_h * V + o_v[None, :]
            b_out = tl.load(p_tile_out, mask=m_tv, other=0.0).to(tl.float32)
            p_gate = p_z + (first + o_t[:, None]) * stride_z + i_h * V + o_v[None, :]
            b_out = _gated(b_out, p_norm, p_gate, o_v, o_v < V, m_tv, eps, V, p_out.dtype.element_ty)
            tl.store(p_tile_out, b_out, mask=m_tv)
