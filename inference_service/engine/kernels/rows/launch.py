"""Launches from tensors: checks, tiles, grids. The only entry to the kernels.

Each function raises `ValueError` where shapes, dtypes, strides or devices do not fit.

Rows of tensors are contiguous, with any stride between them. Padding rows are harmless: no row reads another.
"""

from functools import cache
from typing import Any, Final, Literal

import torch
from torch import Tensor

from inference_service.engine.kernels.launch import Launch, RowTile, kernels_of, require, require_shape
from inference_service.engine.kernels.rounded import rounded_beside
from inference_service.engine.kernels.rows.tuning import TILE, fp8_config, norm_config
from inference_service.engine.kernels.sgmv import Slices, Update

Activation = Literal["silu", "gelu_tanh", "gelu"]
"""An activation of an MLP."""
UNROUNDED: Final = {"p_values": None, "p_scales": None}
"""Arguments of a kernel that does not write fp8."""


def norm(
    hidden: Tensor,
    weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    centred: bool = False,
    bias: Tensor | None = None,
    delta: Tensor | None = None,
    delta_weight: Tensor | None = None,
    out: Tensor | None = None,
    fp8: bool = False,
) -> Tensor:
    """Add ``delta`` to ``hidden`` in place, and return its rows, normed and times (offset + weight).

    Sums are in float32, and rounded where torch would round: hidden after the addition, the result once.

    Args:
        hidden: [T, dim]: the residual stream.
        weight: [dim]; the offset is added to it in float32.
        eps: added to the mean square, also for ``delta_weight``.
        offset: 1 for Gemma.
        centred: whether a row's mean is subtracted from it first: a layer norm.
        bias: [dim], added to the result.
        delta: [T, dim], added to hidden.
        delta_weight: [dim]: delta is normed with it (and the offset) before it is added.
        out: where the result is written; it may be ``hidden``.
        fp8: whether the result is written as `kernels.rounded.round_rows` rounds it, too.

    Returns:
        [T, dim].
    """
    kernels = kernels_of(__name__, hidden)
    _check_norm(hidden, weight, bias, delta, delta_weight)
    dim = hidden.shape[1]
    if out is None:
        out = hidden.new_empty(hidden.shape)
    else:
        require_shape(out, "out", tuple(hidden.shape), hidden.dtype, hidden.device)
    arguments = {
        "p_hidden": hidden,
        "p_delta": delta,
        "p_delta_weight": delta_weight,
        "p_weight": weight,
        "p_bias": bias,
        "p_out": out,
        **(rounded_beside(out) if fp8 else UNROUNDED),
        "dim": dim,
        "stride_hidden": hidden.stride(0),
        "stride_delta": 0 if delta is None else delta.stride(0),
        "stride_out": out.stride(0),
        "eps": eps,
        "offset": offset,
        "CENTRED": centred,
        **norm_config(dim).arguments,
    }
    Launch(kernels.norm_kernel, (len(out),), arguments)()
    return out


def gated(
    gate_up: Tensor, activation: Activation, update: Update | None = None, *, fp8: bool = False
) -> Tensor:
    """Return activation(gate) * up [T, I] of gate and up side by side [T, 2 * I], to which an update is added.

    The activation is rounded before the product, as torch does it in two launches. Rows are written in fp8 too,
    as those of `norm`, where one program has a whole row: without an update. Raise ValueError for an odd number
    of columns, or a tensor that kernels do not take.
    """
    return _activated(halved(gate_up)[1], 2, activation, update, fp8=fp8)


def activated(x: Tensor, activation: Activation, update: Update | None = None, *, fp8: bool = False) -> Tensor:
    """Return activation(x) of x [T, I], as `gated` does."""
    require(x, "x", dims=2)
    return _activated(_of_rows(x, x.shape[1])[1], 1, activation, update, fp8=fp8)


def _activated(
    arguments: dict[str, Any], halves: int, activation: Activation, update: Update | None, *, fp8: bool
) -> Tensor:
    out, columns = arguments["p_out"], arguments["I"]
    kernels = kernels_of(__name__, out)
    arguments["ACTIVATION"] = activation
    if update is None:
        row = fp8_config(columns) if fp8 else None
        arguments |= {"HALVES": halves, **(rounded_beside(out) if row else UNROUNDED)}
        tiled(kernels.activated_kernel, out, arguments, row)
    else:
        if update.slices != Slices.consecutive(*[columns] * halves):
            raise ValueError(
                f"the update is of {update.slices}, and there are {halves} times {columns} columns"
            )
        del arguments["I"]
        config = update.config
        arguments |= {"STEP_N": config.step_n, "BLOCK_N": config.block_n}
        options = {"num_warps": config.num_warps, "num_stages": 1}
        grid = config.grid(Slices.consecutive(columns), update.runs)
        Launch(kernels.activated_update_kernel, (grid,), {**arguments, **update.arguments, **options})()
    return out  # type: ignore[no-any-return]


def halved(gate_up: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Return an empty [T, I] for what a kernel makes of gate_up [T, 2 * I], and what it reads of the two.

    Raises:
        ValueError: an odd number of columns, or a tensor that kernels do not take.
    """
    require(gate_up, "gate_up", dims=2)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must have an even number of columns, got {gate_up.shape[1]}")
    return _of_rows(gate_up, gate_up.shape[1] // 2)


def _of_rows(x: Tensor, columns: int) -> tuple[Tensor, dict[str, Any]]:
    out = x.new_empty(len(x), columns)
    return out, {
        "p_gate_up": x,
        "p_out": out,
        "I": columns,
        "stride_gate_up": x.stride(0),
        "stride_out": out.stride(0),
    }


def embed(tokens: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    """Return rows [T, dim] of a table [V, dim], by tokens int32 or int64 [T], times a scale.

    The scale is rounded to the table's dtype first: Gemma was trained with one in bfloat16.
    """
    kernels = kernels_of(__name__, table)
    require(table, "table", dims=2)
    _require_indices(tokens, "tokens", table.device)
    out = table.new_empty(len(tokens), table.shape[1])
    arguments = {
        "p_tokens": tokens,
        "p_table": table,
        "p_out": out,
        "dim": table.shape[1],
        "stride_table": table.stride(0),
        "stride_out": out.stride(0),
        "scale": _rounded(scale, table.dtype),
    }
    tiled(kernels.embed_kernel, out, arguments)
    return out


@cache
def _rounded(scale: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(scale, dtype=dtype))


def softcap(logits: Tensor, cap: float) -> None:
    """Replace logits [N, V] by tanh(logits / cap) * cap, in float32 and with one rounding.

    Raises:
        ValueError: a cap that is not positive, or a tensor that kernels do not take.
    """
    kernels = kernels_of(__name__, logits)
    require(logits, "logits", dims=2)
    if cap <= 0:
        raise ValueError(f"cap must be positive, got {cap}")
    arguments = {"p_logits": logits, "V": logits.shape[1], "stride_logits": logits.stride(0), "cap": cap}
    tiled(kernels.softcap_kernel, logits, arguments)


def _check_norm(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor | None, delta_weight: Tensor | None
) -> None:
    require(hidden, "hidden", dims=2)
    like = hidden.dtype, hidden.device
    require_shape(weight, "weight", (hidden.shape[1],), *like)
    if bias is not None:
        require_shape(bias, "bias", (hidden.shape[1],), *like)
    if delta is not None:
        require_shape(delta, "delta", tuple(hidden.shape), *like)
    if delta_weight is not None:
        if delta is None:
            raise ValueError("delta_weight needs a delta")
        require_shape(delta_weight, "delta_weight", (hidden.shape[1],), *like)


def tiled(kernel: Any, out: Tensor, arguments: dict[str, Any], config: RowTile | None = None) -> None:
    """Launch a kernel with a program for each tile of each row of out."""
    config = config or TILE[out.dtype.itemsize]
    grid = len(out), -(-out.shape[1] // config.block)
    Launch(kernel, grid, arguments | config.arguments)()


def _require_indices(tensor: Tensor, name: str, device: torch.device) -> None:
    require(tensor, name, dims=1, device=device)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {tensor.dtype}")
