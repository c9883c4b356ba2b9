"""The speed of reading weights, measured at the start, and the allocator of a replica."""

import ctypes
import threading
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from inference_service.backends.operations import Backend
from inference_service.core.computing import Computing
from inference_service.layers.linear import Linear
from inference_service.startup import base, memory as heap
from inference_service.startup.base import BOUND_S, bytes_per_s
from loramux_shared.bases.config import ModelConfig
from loramux_shared.runtime import Rounding

INSIDE, OUTSIDE = 4096, 1024
BYTES = INSIDE * OUTSIDE * 4
"""Bytes of each linear."""


class Products:
    """Operations whose products take what they are made to take, on a clock that they own."""

    def __init__(self, seconds: Iterator[float]) -> None:
        self.now, self.count = 0.0, 0
        self._seconds = seconds

    def linear(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        assert x.shape == (1, layer.in_features)
        self.now += next(self._seconds)
        self.count += 1
        return x


def measured(monkeypatch, linears: int, seconds: Iterator[float], saved: int = 0) -> tuple[float, Products]:
    """The speed with so many linears, whose products take these seconds."""
    products = Products(seconds)
    monkeypatch.setattr(base, "time", SimpleNamespace(perf_counter=lambda: products.now))
    fields: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "operations": products}
    backend = cast(Backend, SimpleNamespace(**fields, quantization=Rounding.NONE))
    linear = cast(Linear, SimpleNamespace(in_features=INSIDE, out_features=OUTSIDE, saved_bytes=saved))
    return bytes_per_s(backend, repeat(linear, linears)), products


def test_the_best_windows_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed is that of the best windows, without the first product and without stolen cores."""
    speed, products = measured(monkeypatch, 8, iter([9e-3, 8e-3, 8e-3, 8e-3, 8e-3, 3e-4, 3e-4, 9e-3]))
    assert speed == pytest.approx(BYTES / 3e-4)
    assert products.count == 8


def test_weights_in_fewer_bits_are_read_sooner_and_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of a token and the speed are those of the stored weights."""
    speed, _ = measured(monkeypatch, 3, chain([1.0], repeat(1e-4)), BYTES // 4)
    assert speed == pytest.approx(0.75 * BYTES / 1e-4)
    monkeypatch.setattr(base, "token_bytes", lambda *_: 1_000_000)
    monkeypatch.setattr(base, "bytes_per_s", lambda *_: 1e9)
    fields = {"dtype": torch.float32, "quantization": Rounding.NONE, "computing": Computing()}
    backend = cast(Backend, SimpleNamespace(**fields))
    sizes = {"in_features": INSIDE, "out_features": OUTSIDE}
    linears = [cast(Linear, SimpleNamespace(**sizes, saved_bytes=saved)) for saved in (BYTES // 4, 0)]
    assert base.reading_of(backend, cast(ModelConfig, None), linears).token_bytes == 875_000
    assert base.reading_of(backend, cast(ModelConfig, None), []).token_bytes == 1_000_000


def test_a_start_does_not_wait_for_it_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement of any model ends at the bound: but for the first product, and the running one."""
    _, products = measured(monkeypatch, 10**6, repeat(0.02))
    assert products.now <= BOUND_S + 2 * 0.02


def test_a_small_model_is_measured_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model is measured as a whole, as its reading may end within the first window."""
    assert measured(monkeypatch, 3, chain([1.0], repeat(1e-4)))[0] == pytest.approx(BYTES / 1e-4)
    assert measured(monkeypatch, 1, repeat(1e-4))[0] == 0


def test_a_speed_that_no_machine_has_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(monkeypatch, 20, repeat(BYTES / 0.9e9))[0] == 0


def test_what_is_known_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start line has bytes, speed and the time of a token."""
    both = Computing(token_bytes=270_000_000, bytes_per_s=19e9)
    assert both.reading == "0.27 GB of weights a token, 19 GB/s measured: at best 14.2 ms a token"
    assert Computing(bytes_per_s=19e9).reading == "19 GB/s measured"
    assert Computing().reading == ""


def anonymous() -> int:
    """Bytes of this process that lie in no file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another libc")
def test_what_a_thread_freed_is_the_systems_again() -> None:
    """Pieces too small to be mapped alone are given back, though the last of them is still there."""
    heap.bound_arenas()
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    pieces: list[int] = []

    def load() -> None:
        pieces.extend(libc.malloc(60_000) for _ in range(1000))
        for piece in pieces:
            ctypes.memset(piece, 1, 60_000)
        for piece in pieces[:-1]:
            libc.free(piece)

    before = anonymous()
    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    full = anonymous()
    heap.give_back()
    libc.free(pieces[-1])
    assert full - before > 50_000_000
    assert anonymous() - before < 10_000_000
