"""Launches from tensors: checks, tiles, grids. The only entry to the kernels.

Each function raises `ValueError` where shapes, dtypes, strides or devices do not fit.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference_service.engine.kernels.delta import tuning
from inference_service.engine.kernels.delta.inputs import DeltaInputs
from inference_service.engine.kernels.delta.layout import DeltaTables
from inference_service.engine.kernels.launch import Launch, kernels_of
from inference_service.engine.kernels.packing import block_of, power_of_two


def gated_delta(inputs: DeltaInputs, tables: DeltaTables) -> Tensor:
    """Return [T, value heads * value dim] of the rows, and take the states of their sequences behind them.

    Rows that belong to no chunk are 0. Launches depend on capacities and addresses alone, so that they stay
    right for whatever the tables hold when they run.
    """
    kernels = kernels_of(__name__, inputs.qkv)
    _check(inputs, tables)
    rows, capacity = inputs.qkv.shape[0], tables.capacity
    # Steps that decode write every row of the capacity; a step may have fewer.
    new = inputs.z.new_empty if capacity.tile is None else inputs.z.new_zeros
    out = new(capacity.rows if capacity.tile is None else rows, inputs.z.shape[1])
    planner = _Planner(kernels, inputs, tables, torch.empty_like(inputs.qkv).contiguous(), out)
    for launch in planner.launches():
        launch()
    return out[:rows]


@dataclass(frozen=True)
class _Planner:
    """Plans the launches of one layer."""

    kernels: Any
    """The module of kernels."""
    inputs: DeltaInputs
    tables: DeltaTables
    x: Tensor
    """[T, channels]: what was convolved."""
    out: Tensor

    def launches(self) -> list[Launch]:
        """Convolve, step where chunks have one row, and compute longer ones in tiles where there may be any."""
        launches = [self._conv(), self._step()]
        if self.tables.capacity.tiles:
            launches += self._tiled()
        return launches

    def _conv(self) -> Launch:
        at, capacity, config = self.inputs, self.tables.capacity, tuning.CONV
        channels = at.qkv.shape[1]
        arguments = {
            "p_qkv": at.qkv,
            "p_weight": at.weights.conv,
            "p_states": at.states.conv,
            "p_out": self.x,
            "p_chunks": self.tables.chunks,
            "channels": channels,
            "stride_qkv": at.qkv.stride(0),
            "WIDTH": at.width,
            "BLOCK_T": 1 if capacity.tile is None else config.block_t,
            "BLOCK_W": power_of_two(at.width - 1),
            "BLOCK_C": config.block_c,
            "num_warps": config.num_warps,
        }
        grid = capacity.chunks, -(-channels // config.block_c)
        return Launch(self.kernels.conv_kernel, grid, arguments)

    def _step(self) -> Launch:
        at, capacity = self.inputs, self.tables.capacity
        arguments = {
            **self._rows,
            **self._gate,
            "p_states": at.states.recurrent,
            "p_chunks": self.tables.chunks,
            "ALONE": capacity.tile is None,
            "BLOCK_V": block_of(at.value_dim),
            "num_warps": tuning.STEP_WARPS,
        }
        return Launch(self.kernels.step_kernel, (capacity.chunks, at.value_heads), arguments)

    def _tiled(self) -> list[Launch]:
        at, tables, config = self.inputs, self.tables, tuning.TILES[self.x.dtype.itemsize]
        shape = len(self.x), at.value_heads
        sizes = {"p_values": at.value_dim, "p_reads": at.key_dim, "p_weights": config.tile}
        prepared = {name: self.x.new_empty(*shape, size, dtype=torch.float32) for name, size in sizes.items()}
        prepared["p_total"] = self.x.new_empty(shape, dtype=torch.float32)
        tiled = {"BLOCK_T": config.tile, "PRECISION": config.precision, "num_stages": tuning.NUM_STAGES}
        prepare = {
            **self._rows,
            **prepared,
            **tiled,
            "p_tiles": tables.tiles,
            "BLOCK_D": config.block_d,
            "LEVELS": config.tile.bit_length() - 1,
            "SOLVE_PRECISION": config.solve_precision,
            "UPCAST": self.kernels.INTERPRETED,
            "num_warps": config.prepare_warps,
        }
        scan = {
            **self._heads,
            **prepared,
            **tiled,
            "p_states": at.states.recurrent,
            "p_out": self.out,
            "p_chunks": tables.chunks,
            "BLOCK_V": config.block_v,
            "num_warps": config.scan_warps,
        }
        gate = {
            **self._gate,
            "p_tiles": tables.tiles,
            "H": at.value_heads,
            "V": at.value_dim,
            "BLOCK_T": tuning.GATE_BLOCK_T,
            "BLOCK_V": block_of(at.value_dim),
            "num_warps": tuning.GATE_WARPS,
        }
        grid = tables.capacity.tiles, at.value_heads
        columns = -(-at.value_dim // config.block_v)
        return [
            Launch(self.kernels.prepare_kernel, grid, prepare),
            Launch(self.kernels.scan_kernel, (tables.capacity.chunks, at.value_heads, columns), scan),
            Launch(self.kernels.gate_kernel, grid, gate),
        ]

    @property
    def _heads(self) -> dict[str, Any]:
        """Return the convolved rows, and their division into heads."""
        at = self.inputs
        return {
            "p_x": self.x,
            "channels": self.x.shape[1],
            "scale": at.key_dim**-0.5,
            "H": at.value_heads,
            "GROUP": at.value_heads // at.key_heads,
            "K": at.key_dim,
            "V": at.value_dim,
            "BLOCK_K": block_of(at.key_dim),
        }

    @property
    def _rows(self) -> dict[str, Any]:
        """The same, with what decays and writes."""
        at = self.inputs
        return {
            **self._heads,
            "p_b": at.b,
            "p_a": at.a,
            "p_decay": at.weights.decay,
            "p_dt_bias": at.weights.dt_bias,
            "stride_b": at.b.stride(0),
            "stride_a": at.a.stride(0),
        }

    @property
    def _gate(self) -> dict[str, Any]:
        """The output, and what it is normed and gated with."""
        at = self.inputs
        return {
            "p_out": self.out,
            "p_z": at.z,
            "p_norm": at.weights.norm,
            "stride_z": at.z.stride(0),
            "eps": at.weights.eps,
        }


def _check(inputs: DeltaInputs, tables: DeltaTables) -> None:
    capacity = tables.capacity
    if tables.packed.device != inputs.qkv.device:
        raise ValueError(f"tables must be on {inputs.qkv.device}, got {tables.packed.device}")
    if len(inputs.qkv) > capacity.rows:
        raise ValueError(f"{len(inputs.qkv)} rows, but tables for {capacity.rows}")
    if max(inputs.key_dim, inputs.value_dim) > tuning.MAX_DIM:
        raise ValueError(
            f"keys and values have at most {tuning.MAX_DIM} dimensions, got {inputs.key_dim} "
            f"and {inputs.value_dim}"
        )
    if inputs.width < 2:
        raise ValueError(f"the convolution sees at least 2 rows, got {inputs.width}")
    tile = tuning.TILES[inputs.qkv.dtype.itemsize].tile
    if capacity.tile not in (None, tile):
        raise ValueError(f"tiles of {inputs.qkv.dtype} have {tile} rows, got tables for {capacity.tile}")
