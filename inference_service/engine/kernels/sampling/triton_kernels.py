"""The two kernels of the draw, the three around them for shaped rows, and what they share. N rows, V tokens."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# The bodies are Triton, not Python: only the compiler knows their types.

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""True if the kernels below were made for the interpreter."""

_FIELDS = tl.constexpr(8)
_GREEDY, _RACE, _FILTERED = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_NO_ID = tl.constexpr(2**31 - 1)
_SHAPE_FIELDS = tl.constexpr(12)
_PENALIZED, _RESTRICTED, _MASKED = tl.constexpr(2), tl.constexpr(4), tl.constexpr(8)


@triton.jit
def _float(p_field):
    return tl.load(p_field).to(tl.float32, bitcast=True)


@triton.jit
def _logits(p_row, o_v, m_v):
    """Logits in float32; -inf is what is masked, beyond the end, or no number."""
    b_logit = tl.load(p_row + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
    return tl.where(b_logit == b_logit, b_logit, float("-inf"))


@triton.jit
def _noise(p_params, first, BLOCK: tl.constexpr):
    """Gumbel noise [BLOCK] of the tokens from a multiple of 4 on, by Philox-4x32-10: 4 tokens per counter.

    -log(E) with E = -log(1 - u) exponential. The smallest E decide a race, so u near 0 has all digits that a
    float holds, and its logarithm is a series there.
    """
    seed = (tl.load(p_params + 6).to(tl.int64) << 32) | (tl.load(p_params + 5).to(tl.int64) & 0xFFFFFFFF)
    o_counter = first // 4 + tl.arange(0, BLOCK // 4)
    b_zero = o_counter * 0
    b_0, b_1, b_2, b_3 = tl.philox(seed, o_counter, b_zero + tl.load(p_params + 7), b_zero, b_zero)
    b_bits = tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), [BLOCK])
    b_u = (b_bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    b_series = b_u * (0.2 + b_u * (1.0 / 6 + b_u / 7))
    b_series = b_u * (1.0 + b_u * (0.5 + b_u * (1.0 / 3 + b_u * (0.25 + b_series))))
    b_far = -tl.log(tl.maximum(1.0 - b_u, 5.9604645e-8))  # 2^-24
    return -tl.log(tl.where(b_u < 0.0625, b_series, b_far))


@triton.jit
def _best(b_score, o_v, m_v):
    """(largest score, lowest token that has it)."""
    b_score = tl.where(m_v, b_score, float("-inf"))
    score = tl.max(b_score, axis=0)
    return score, tl.min(tl.where(m_v & (b_score == score), o_v, _NO_ID), axis=0)


@triton.jit
def race_kernel(
    p_logits,  # [N, V]
    p_rows,  # int32 [N, FIELDS]
    p_scores,  # fp32 [N, tiles]
    p_ids,  # int32 [N, tiles]
    V,
    stride_logits,
    stride_tiles,
    BLOCK: tl.constexpr,
):
    """The best score and its token of one tile. One program per (row, tile).

    Scores are logits, and with noise where all tokens race: then the best of the row has won.
    """
    i_n, i_v = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_params = p_rows + i_n * _FIELDS
    kind = tl.load(p_params)
    if kind == 0:
        return
    o_v = i_v * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_v = o_v < V
    b_score = _logits(p_logits + i_n * stride_logits, o_v, m_v)
    if kind == _RACE:
        b_score = b_score * _float(p_params + 1) + _noise(p_params, i_v * BLOCK, BLOCK)
    score, token = _best(b_score, o_v, m_v)
    tl.store(p_scores + i_n * stride_tiles + i_v, score)
    tl.store(p_ids + i_n * stride_tiles + i_v, token)


@triton.jit
def _key(b_logit, SHIFT: tl.constexpr):
    """int32 keys in the order of the logits, without the SHIFT bits that their dtype does not have."""
    b_bits = tl.where(b_logit == 0.0, 0.0, b_logit).to(tl.int32, bitcast=True)  # one key for both zeros
    return (b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _weighed(p_row, o_v, V, best, floor, sharpness, SHIFT: tl.constexpr):
    """(keys, whether they take part, masses relative to the most likely token) of a tile."""
    b_logit = _logits(p_row, o_v, o_v < V)
    m_valid = (b_logit > float("-inf")) & (b_logit >= floor)
    b_mass = tl.where(m_valid, tl.exp((b_logit - best) * sharpness), 0.0)
    return _key(b_logit, SHIFT), m_valid, b_mass


@triton.jit
def _above(b_key, m_valid, b_mass, pivot):
    """(count, mass) of the keys above a pivot, summed over the lines of a tile.

    Counts are float32, exact up to 2^24: of booleans, LLVM would make bit masks on the stack.
    """
    m_above = m_valid & (b_key > pivot)
    return tl.sum(tl.where(m_above, 1.0, 0.0), axis=0), tl.sum(tl.where(m_above, b_mass, 0.0), axis=0)


@triton.jit
def _search(
    p_row, V, best, floor, sharpness, limit, low, high, n_low, mass_low,
    BY_MASS: tl.constexpr, SHIFT: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Narrow (low, high] to one value or one token, keeping the measure above low >= limit > that above high.

    n and mass are of the keys above low or high, of which there are none at first. Sums have one order, so that
    they fall as pivots rise.
    """
    n_high, mass_high = 0.0, 0.0
    o_tile = tl.arange(0, LINES)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [LINES, BLOCK]
    while (high.to(tl.int64) - low.to(tl.int64) > 1) & (n_low - n_high > 1.0):
        span = high.to(tl.int64) - low.to(tl.int64)
        pivot_1 = (low + (span >> 2)).to(tl.int32)
        pivot_2 = (low + (span >> 1)).to(tl.int32)
        pivot_3 = (low + (3 * span >> 2)).to(tl.int32)
        b_n_1 = tl.zeros([BLOCK], tl.float32)
        b_n_2, b_n_3, b_mass_1, b_mass_2, b_mass_3 = b_n_1, b_n_1, b_n_1, b_n_1, b_n_1
        for first in range(0, V, LINES * BLOCK):
            b_key, m_valid, b_mass = _weighed(p_row, first + o_tile, V, best, floor, sharpness, SHIFT)
            b_n, b_sum = _above(b_key, m_valid, b_mass, pivot_1)
            b_n_1, b_mass_1 = b_n_1 + b_n, b_mass_1 + b_sum
            b_n, b_sum = _above(b_key, m_valid, b_mass, pivot_2)
            b_n_2, b_mass_2 = b_n_2 + b_n, b_mass_2 + b_sum
            b_n, b_sum = _above(b_key, m_valid, b_mass, pivot_3)
            b_n_3, b_mass_3 = b_n_3 + b_n, b_mass_3 + b_sum
        n_1, n_2, n_3 = tl.sum(b_n_1, axis=0), tl.sum(b_n_2, axis=0), tl.sum(b_n_3, axis=0)
        mass_1, mass_2, mass_3 = tl.sum(b_mass_1, axis=0), tl.sum(b_mass_2, axis=0), tl.sum(b_mass_3, axis=0)
        over_1 = (mass_1 if BY_MASS else n_1) >= limit
        over_2 = (mass_2 if BY_MASS else n_2) >= limit
        over_3 = (mass_3 if BY_MASS else n_3) >= limit
        high = tl.where(over_3, high, tl.where(over_2, pivot_3, tl.where(over_1, pivot_2, pivot_1)))
        n_high = tl.where(over_3, n_high, tl.where(over_2, n_3, tl.where(over_1, n_2, n_1)))
        mass_high = tl.where(over_3, mass_high, tl.where(over_2, mass_3, tl.where(over_1, mass_2, mass_1)))
        low = tl.where(over_3, pivot_3, tl.where(over_2, pivot_2, tl.where(over_1, pivot_1, low)))
        n_low = tl.where(over_3, n_3, tl.where(over_2, n_2, tl.where(over_1, n_1, n_low)))
        mass_low = tl.where(over_3, mass_3, tl.where(over_2, mass_2, tl.where(over_1, mass_1, mass_low)))
    return low, high, n_low, n_high, mass_low, mass_high


@triton.jit
def _totals(p_row, V, best, floor, sharpness, SHIFT: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """(count, mass, smallest key) of the tokens that take part."""
    o_tile = tl.arange(0, LINES)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [LINES, BLOCK]
    b_n, b_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    b_low = tl.full([BLOCK], 2**31 - 1, tl.int32)
    for first in range(0, V, LINES * BLOCK):
        b_key, m_valid, b_mass = _weighed(p_row, first + o_tile, V, best, floor, sharpness, SHIFT)
        b_n += tl.sum(tl.where(m_valid, 1.0, 0.0), axis=0)
        b_sum += tl.sum(b_mass, axis=0)
        b_low = tl.minimum(b_low, tl.min(tl.where(m_valid, b_key, 2**31 - 1), axis=0))
    return tl.sum(b_n, axis=0), tl.sum(b_sum, axis=0), tl.min(b_low, axis=0)


@triton.jit
def _threshold(
    p_row, p_params, V, best, floor, sharpness,
    SHIFT: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(low, high, taken): what is above high takes part, and the first ``taken`` tokens of (low, high]."""
    top_k, top_p = tl.load(p_params + 2).to(tl.float32), _float(p_params + 3)
    n_low, mass_low, low = _totals(p_row, V, best, floor, sharpness, SHIFT, LINES, BLOCK)
    low -= 1
    high, n_high, mass_high = low, n_low, mass_low
    taken, total, top = n_low - n_high, mass_low, _key(best, SHIFT)
    if top_k < n_low:
        low, high, n_low, n_high, mass_low, mass_high = _search(
            p_row, V, best, floor, sharpness, top_k, low, top, n_low, mass_low,
            False, SHIFT, LINES, BLOCK,
        )  # fmt: skip
        taken = top_k - n_high
        total = mass_high + taken * ((mass_low - mass_high) / (n_low - n_high))
    if top_p < 1.0:
        limit = top_p * total
        if (n_high > 0) & (mass_high >= limit):
            low, high, n_low, n_high, mass_low, mass_high = _search(
                p_row, V, best, floor, sharpness, limit, high, top, n_high, mass_high,
                True, SHIFT, LINES, BLOCK,
            )  # fmt: skip
            taken = n_low - n_high
        # All of (low, high] have one mass, so the first is in, and then one for each that fits below the limit.
        fitting = tl.ceil((limit - mass_high) / ((mass_low - mass_high) / (n_low - n_high)))
        taken = tl.minimum(taken, tl.maximum(fitting, 1.0))
    return low, high, taken.to(tl.int32)


@triton.jit
def _race_of_support(
    p_row, p_params, V, best, token, SHIFT: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr
):
    """The winner among the tokens that min-p, top-k and top-p leave; ``token`` where they leave none."""
    sharpness, floor = _float(p_params + 1), best - _float(p_params + 4)
    low, high, taken = _threshold(p_row, p_params, V, best, floor, sharpness, SHIFT, LINES, BLOCK)
    score, seen = float("-inf"), 0
    for first in range(0, V, BLOCK):
        o_v = first + tl.arange(0, BLOCK)  # [BLOCK]
        b_logit = _logits(p_row, o_v, o_v < V)
        b_key = _key(b_logit, SHIFT)
        m_v = (b_logit > float("-inf")) & (b_logit >= floor) & (b_key > low)
        if tl.sum(m_v.to(tl.int32), axis=0) > 0:
            b_last = (m_v & (b_key <= high)).to(tl.int32)
            m_v = m_v & ((b_key > high) | (seen + tl.cumsum(b_last, axis=0) <= taken))
            seen += tl.sum(b_last, axis=0)
            here, winner = _best(b_logit * sharpness + _noise(p_params, first, BLOCK), o_v, m_v)
            token = tl.where(here > score, winner, token)
            score = tl.maximum(score, here)
    return token


@triton.jit
def pick_kernel(
    p_logits,  # [N, V]
    p_rows,  # int32 [N, FIELDS]
    p_scores,  # fp32 [N, tiles]
    p_ids,  # int32 [N, tiles]
    p_out,  # int [N]
    V,
    tiles,
    stride_logits,
    stride_tiles,
    TILES: tl.constexpr,
    SHIFT: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The token of each row: that of its best tile, or for a filtered row the winner of another race."""
    i_n = tl.program_id(0).to(tl.int64)
    p_params = p_rows + i_n * _FIELDS
    kind = tl.load(p_params)
    if kind == 0:
        return
    o_tile = tl.arange(0, TILES)  # [TILES]
    m_tile = o_tile < tiles
    b_score = tl.load(p_scores + i_n * stride_tiles + o_tile, mask=m_tile, other=float("-inf"))
    b_id = tl.load(p_ids + i_n * stride_tiles + o_tile, mask=m_tile, other=0)
    best, token = _best(b_score, b_id, m_tile)
    if kind == _FILTERED:
        p_row = p_logits + i_n * stride_logits
        token = _race_of_support(p_row, p_params, V, best, token, SHIFT, LINES, BLOCK)
    tl.store(p_out + i_n, token)


@triton.jit
def _allowed(b_logit, p_mask, o_v, m_v):
    """Logits, and -inf where the bit of a token is not set."""
    b_word = tl.load(p_mask + o_v // 32, mask=m_v, other=0)
    return tl.where((b_word >> (o_v % 32)) & 1 != 0, b_logit, float("-inf"))


@triton.jit
def shape_kernel(
    p_logits,  # [N, V]
    p_shaped,  # fp32 [M, V]
    p_packed,  # int32: M rows of _SHAPE_FIELDS, and the lists behind them
    p_counts,  # int32 [places, V]: 2 x how often in the answer, and 1 where in the prompt
    p_masks,  # int32 [places, words]
    V,
    words,
    stride_logits,
    BLOCK: tl.constexpr,
):
    """Penalties and masks of one tile of a row that a request shapes. One program per (such row, tile).

    Compiled without fused multiply-adds, so that every rounding is the reference's.
    """
    i_m, i_v = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_row = p_packed + i_m * _SHAPE_FIELDS
    flags = tl.load(p_row)
    if flags == 0:
        return
    row, place = tl.load(p_row + 1).to(tl.int64), tl.load(p_row + 2).to(tl.int64)
    o_v = i_v * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_v = o_v < V
    b_logit = tl.load(p_logits + row * stride_logits + o_v, mask=m_v, other=0.0).to(tl.float32)
    if flags & _PENALIZED != 0:
        b_seen = tl.load(p_counts + place * V + o_v, mask=m_v, other=0)
        b_count = (b_seen >> 1).to(tl.float32)
        factor = _float(p_row + 3)
        b_own = tl.where(b_logit > 0.0, tl.div_rn(b_logit, factor), b_logit * factor)
        b_own = b_own - tl.where(b_count > 0.0, _float(p_row + 4), 0.0) - b_count * _float(p_row + 5)
        b_logit = tl.where(b_seen > 0, b_own, b_logit)
    if flags & _RESTRICTED != 0:
        b_logit = _allowed(b_logit, p_masks + place * words, o_v, m_v)
    if flags & _MASKED != 0:
        b_logit = _allowed(b_logit, p_packed + tl.load(p_row + 6), o_v, m_v)
    tl.store(p_shaped + i_m * V + o_v, b_logit, mask=m_v)


@triton.jit
def _finite(b_logit):
    """How many of them are finite; NaN is not."""
    return tl.sum(tl.where(tl.abs(b_logit) < float("inf"), 1.0, 0.0), axis=0)


@triton.jit
def edit_kernel(
    p_shaped,  # fp32 [M, V]
    p_packed,  # int32
    p_last,  # int32 [places]: the last token of each answer
    V,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What concerns a few tokens: biases, last tokens of bad words, stop tokens. One program per shaped row.

    All but the stop tokens are sums, for which atomics are in no order that matters: a token has one bias at
    most, and a sum with -inf is -inf. Stop tokens go unless nothing else is left.
    """
    i_m = tl.program_id(0).to(tl.int64)
    p_row, p_own = p_packed + i_m * _SHAPE_FIELDS, p_shaped + i_m * V
    if tl.load(p_row) == 0:
        return
    last = tl.load(p_last + tl.load(p_row + 2))
    p_edits, edits = p_packed + tl.load(p_row + 7), tl.load(p_row + 8)
    for first in range(0, edits, ENTRIES):
        o_e = first + tl.arange(0, ENTRIES)  # [ENTRIES]
        b_token = tl.load(p_edits + 3 * o_e, mask=o_e < edits, other=V)
        b_after = tl.load(p_edits + 3 * o_e + 1, mask=o_e < edits, other=0)
        b_value = tl.load(p_edits + 3 * o_e + 2, mask=o_e < edits, other=0).to(tl.float32, bitcast=True)
        tl.atomic_add(p_own + b_token, b_value, mask=(b_token < V) & ((b_after < 0) | (b_after == last)))
    p_stops, stops = p_packed + tl.load(p_row + 9), tl.load(p_row + 10)
    if stops > 0:
        tl.debug_barrier()
        left = 0.0
        for first in range(0, V, BLOCK):
            o_v = first + tl.arange(0, BLOCK)  # [BLOCK]
            left += _finite(tl.load(p_own + o_v, mask=o_v < V, other=float("inf")))
        for first in range(0, stops, ENTRIES):
            o_s = first + tl.arange(0, ENTRIES)  # [ENTRIES]
            b_token = tl.load(p_stops + o_s, mask=o_s < stops, other=V)
            left -= _finite(tl.load(p_own + b_token, mask=b_token < V, other=float("inf")))
        if left > 0.0:
            for first in range(0, stops, ENTRIES):
                o_s = first + tl.arange(0, ENTRIES)  # [ENTRIES]
                b_token = tl.load(p_stops + o_s, mask=o_s < stops, other=V)
                tl.store(p_own + b_token, float("-inf"), mask=b_token < V)


@triton.jit
def note_kernel(
    p_drawn,  # int32 [M]
    p_scores,  # fp32 [M, tiles]
    p_packed,  # int32
    p_out,  # int [N]
    p_impossible,  # int32 [N]
    p_last,  # int32 [places]
    p_counts,  # int32 [places, V]
    V,
    tiles,
    TILES: tl.constexpr,
):
    """Hand on the token of a shaped row, and count it for the next one. One program per shaped row."""
    i_m = tl.program_id(0).to(tl.int64)
    p_row = p_packed + i_m * _SHAPE_FIELDS
    flags = tl.load(p_row)
    if flags == 0:
        return
    row, place = tl.load(p_row + 1), tl.load(p_row + 2).to(tl.int64)
    o_tile = tl.arange(0, TILES)  # [TILES]
    b_score = tl.load(p_scores + i_m * tiles + o_tile, mask=o_tile < tiles, other=float("-inf"))
    token = tl.load(p_drawn + i_m)
    tl.store(p_out + row, token)
    tl.store(p_impossible + row, (tl.max(b_score, axis=0) == float("-inf")).to(tl.int32))
    tl.store(p_last + place, token)
    if flags & _PENALIZED != 0:
        p_count = p_counts + place * V + token
        tl.store(p_count, tl.load(p_count) + 2)
