"""The weights of a base that a token reads, and the speed at which this machine reads them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

import torch

from inference_service.backends.base import Backend
from inference_service.core.computing import Computing
from inference_service.layers.linear import Linear
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.memory import token_bytes

BOUND_S: Final = 0.05
"""A start waits no longer for it, but for the product that is running then."""
WINDOW_S: Final = 0.0004
"""Seconds of reading, for one speed: shorter than others take a core away for, so that few have such a gap."""

LEAST: Final = 1e9
"""Bytes a second that every machine reads: a lower speed says that other work held the cores all the time."""


def reading_of(backend: Backend, config: ModelConfig, linears: Iterable[Linear]) -> Computing:
    """Return what computes, with what a token takes at least; linears stand for all that it passes through."""
    every = list(linears)
    counted = sum(_counted(backend, linear) for linear in every)
    reads = token_bytes(config, backend.dtype.itemsize, backend.quantization)
    reads -= reads * sum(linear.saved_bytes for linear in every) // max(1, counted)
    return replace(backend.computing, token_bytes=reads, bytes_per_s=bytes_per_s(backend, every))


def bytes_per_s(backend: Backend, linears: Iterable[Linear]) -> float:
    """Return how many bytes of weights products with one row read in a second: the best tenth of many windows.

    Other work on the cores makes windows slower, by a hundred times where it holds one of two threads up.

    The linears are those of a model, in their order and each once, so that no cache has them. The first one
    wakes threads up and is not measured; 0 where there is no other, or where all were too slow to be true.
    """
    speeds: list[float] = []
    spent, read, ends = 0.0, 0, 0.0
    for index, linear in enumerate(linears):
        x = torch.ones(1, linear.in_features, dtype=backend.dtype, device=backend.device)
        began = time.perf_counter()
        backend.operations.linear(linear, x)
        now = time.perf_counter()
        if not index:
            ends = now + BOUND_S
            continue
        spent += now - began
        read += _counted(backend, linear) - linear.saved_bytes
        if spent > WINDOW_S:
            speeds.append(read / spent)
            spent, read = 0.0, 0
        if now > ends:
            break
    best = sorted(speeds)[len(speeds) * 9 // 10] if speeds else read / spent if spent else 0.0
    return best if best >= LEAST else 0.0


def _counted(backend: Backend, linear: Linear) -> int:
    count = linear.in_features * linear.out_features
    return backend.quantization.weight_bytes(count, backend.dtype.itemsize)
