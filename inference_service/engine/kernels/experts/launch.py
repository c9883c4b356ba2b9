"""Launches from tensors: checks, tiles, grids. The only entry to the kernels.

Each function raises `ValueError` where shapes, dtypes, strides or devices do not fit.

Launches depend on shapes alone, so that it may be recorded. Padding rows are routed like any other.
"""

import torch
from torch import Tensor

from inference_service.engine.kernels.experts.layout import ByExpert, Routed, most_tiles
from inference_service.engine.kernels.experts.tuning import (
    GROUPED,
    MAX_EXPERTS,
    ROUTE_WARPS,
    SORT_BLOCK,
    SORT_WARPS,
    TILE,
    load_of,
)
from inference_service.engine.kernels.launch import Launch, kernels_of, require
from inference_service.engine.kernels.packing import power_of_two
from inference_service.engine.kernels.rows.launch import halved, tiled


def route(logits: Tensor, top_k: int, *, renormalised: bool) -> Routed:
    """Return the experts with the largest logits [T, E], with their probabilities.

    Args:
        logits: [T, E].
        top_k: experts of a token.
        renormalised: whether the weights of a token sum to 1; they are the softmax of its chosen logits then.

    Raises:
        ValueError: too many experts, or fewer than top_k, or a tensor that kernels do not take.
    """
    kernels = kernels_of(__name__, logits)
    require(logits, "logits", dims=2)
    rows, experts = logits.shape
    if not 1 <= top_k <= experts <= MAX_EXPERTS:
        raise ValueError(f"1 <= top_k <= experts <= {MAX_EXPERTS}, got {top_k} and {experts}")
    ids = torch.empty(rows, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(rows, top_k, dtype=torch.float32, device=logits.device)
    arguments = {
        "p_logits": logits,
        "p_ids": ids,
        "p_weights": weights,
        "E": experts,
        "k": top_k,
        "stride_logits": logits.stride(0),
        "RENORMALISED": renormalised,
        "BLOCK_E": power_of_two(experts),
        "BLOCK_K": power_of_two(top_k),
        "num_warps": ROUTE_WARPS,
    }
    Launch(kernels.route_kernel, (rows,), arguments)()
    return Routed(ids, weights)


def by_expert(ids: Tensor, num_experts: int) -> ByExpert:
    """Sort the pairs of a step.

    Raises:
        ValueError: more experts than a program counts, or ids [T, k] that are no contiguous int32.
    """
    kernels = kernels_of(__name__)
    require(ids, "ids", dims=2, dtype=torch.int32)
    if not 1 <= num_experts <= MAX_EXPERTS or not ids.is_contiguous():
        raise ValueError(f"ids must be contiguous, of 1 to {MAX_EXPERTS} experts, got {num_experts}")
    pairs = ids.numel()
    tile = TILE[load_of(pairs, num_experts)]
    count = most_tiles(pairs, num_experts, tile)
    empty = (torch.empty(pairs, dtype=torch.int32, device=ids.device) for _ in range(3))
    tokens, experts, places = empty
    tiles = torch.empty(count, 3, dtype=torch.int32, device=ids.device)
    arguments = {
        "p_ids": ids,
        "p_tokens": tokens,
        "p_experts": experts,
        "p_places": places,
        "p_tiles": tiles,
        "E": num_experts,
        "P": pairs,
        "k": ids.shape[1],
        "tiles": count,
        "TILE": tile,
        "BLOCK_E": power_of_two(num_experts),
        "BLOCK_P": SORT_BLOCK,
        "num_warps": SORT_WARPS,
    }
    Launch(kernels.sort_kernel, (num_experts,), arguments)()
    return ByExpert(tokens, experts, places, tiles, ids.shape[1])


def grouped(
    x: Tensor, weight: Tensor, pairs: ByExpert, bias: Tensor | None = None, *, of_tokens: bool = False
) -> Tensor:
    """Return x W^T + b [P, N], each place with the weight of its expert.

    Args:
        x: [P, K] by place, or [T, K] by token.
        weight: [E, N, K], contiguous.
        pairs: the step's pairs.
        bias: [E, N].
        of_tokens: whether x is by token.
    """
    kernels = kernels_of(__name__, x)
    _check_grouped(x, weight, pairs, bias, of_tokens)
    columns, width = weight.shape[1:]
    out = x.new_empty(len(pairs.tokens), columns)
    load = load_of(len(pairs.tokens), len(weight))
    config = GROUPED[load, x.dtype.itemsize]
    arguments = {
        "p_x": x,
        "p_rows": pairs.tokens if of_tokens else None,
        "p_w": weight,
        "p_bias": bias,
        "p_out": out,
        "p_tiles": pairs.tiles,
        "N": columns,
        "K": width,
        "stride_x": x.stride(0),
        "stride_out": out.stride(0),
        "BLOCK_M": TILE[load],
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "UPCAST": kernels.INTERPRETED,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    grid = -(-columns // config.block_n), len(pairs.tiles)
    Launch(kernels.grouped_kernel, grid, arguments)()
    return out


def _check_grouped(x: Tensor, weight: Tensor, pairs: ByExpert, bias: Tensor | None, of_tokens: bool) -> None:
    require(x, "x", dims=2)
    require(weight, "weight", dims=3, dtype=x.dtype, device=x.device)
    experts, columns, width = weight.shape
    if x.shape[1] != width or not weight.is_contiguous():
        raise ValueError(f"weight must be [E, N, {x.shape[1]}] and contiguous, got {tuple(weight.shape)}")
    if bias is not None:
        require(bias, "bias", dims=2, dtype=x.dtype, device=x.device)
        if tuple(bias.shape) != (experts, columns) or not bias.is_contiguous():
            raise ValueError(f"bias must be {(experts, columns)}, got {tuple(bias.shape)}")
    places = len(pairs.tokens)
    rows = places // pairs.top_k if of_tokens else places
    if len(x) != rows:
        raise ValueError(f"x must have {rows} rows, got {len(x)}")


def clamped(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """Return (up + 1) * gate * sigmoid(alpha * gate) [P, I] of gate and up side by side, clamped before.

    The gate is clamped from above, up from both sides; all in float32, with one rounding. Raise ValueError for
    an odd number of columns, or a tensor that kernels do not take.
    """
    kernels = kernels_of(__name__, gate_up)
    out, arguments = halved(gate_up)
    tiled(kernels.clamped_kernel, out, arguments | {"alpha": alpha, "limit": limit})
    return out


def combine(y: Tensor, routed: Routed, pairs: ByExpert) -> Tensor:
    """Return the weighted sums [T, N] of each token's places of y [P, N]."""
    kernels = kernels_of(__name__, y)
    require(y, "y", dims=2)
    if len(y) != routed.pairs or not routed.weights.is_contiguous():
        raise ValueError(f"y must have {routed.pairs} rows, got {len(y)}, and weights must be contiguous")
    tokens, top_k = routed.ids.shape
    out = y.new_empty(tokens, y.shape[1])
    arguments = {
        "p_y": y,
        "p_places": pairs.places,
        "p_weights": routed.weights,
        "p_out": out,
        "N": y.shape[1],
        "k": top_k,
        "stride_y": y.stride(0),
        "stride_out": out.stride(0),
    }
    tiled(kernels.combine_kernel, out, arguments)
    return out
