"""The adapters in the device's memory, packed per fused linear as the SGMV kernels read them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
import torch
from torch import Tensor

from inference_service.kernels.sgmv import Group, Slices
from inference_service.lora.weights import AdapterWeights, GroupWeights
from loramux_shared.bases.groups import GroupShape

GROWTH: Final = 1.25
"""Memory that is too small grows by at least this, so that loading n adapters does not copy all n times."""


class Bank:
    """Takes adapters in one after the other, each into a slot of its own.

    An adapter is copied to the device on a stream of its own, and may be used when `settle` has returned.
    Memory that is full is replaced by larger memory: whoever holds addresses must take ``groups`` anew after a
    load.
    """

    def __init__(self, shapes: tuple[GroupShape, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.groups: dict[tuple[int, str], Group] = {}
        """By layer and name; those that no adapter touches are not there."""
        self.num_slots = 0
        """Adapters that are loaded."""
        self._shapes = {shape.name: shape for shape in shapes}
        self._dtype = dtype
        self._device = device
        self._packs: dict[tuple[int, str], _Pack] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._loaded: torch.cuda.Event | None = None

    @property
    def num_bytes(self) -> int:
        """Memory of the device that is taken, room to grow included."""
        return sum(pack.num_bytes for pack in self._packs.values())

    def load(self, weights: AdapterWeights) -> int:
        """Pack an adapter and begin to copy it; return its slot. Nothing of the weights is kept.

        Raises:
            ValueError: the packed adapter would mislead a kernel.
        """
        slot = self.num_slots
        with self._aside():
            for layer, touched in enumerate(weights.layers):
                for name, group in touched.items():
                    self._pack_of(layer, name).add(slot, group)
        self.num_slots += 1
        self.groups = {key: pack.group(self.num_slots) for key, pack in self._packs.items()}
        return slot

    def settle(self) -> None:
        """Wait until what was loaded has arrived."""
        if self._loaded is not None:
            self._loaded.synchronize()
            self._loaded = None

    def _pack_of(self, layer: int, name: str) -> _Pack:
        if (layer, name) not in self._packs:
            self._packs[layer, name] = _Pack(self._shapes[name], self._dtype, self._device)
        return self._packs[layer, name]

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Work beside the current stream, after what it was given: that may still read what is replaced."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        self._loaded = self._stream.record_event()


class _Pack:
    """One fused linear's adapters, and room for more."""

    def __init__(self, shape: GroupShape, dtype: torch.dtype, device: torch.device) -> None:
        self._slices = Slices(shape.out_offsets, shape.out_features)
        self._a = torch.empty(0, shape.in_features, dtype=dtype, device=device)
        self._b = torch.empty(0, dtype=dtype, device=device)
        self._table = np.zeros((0, len(shape.modules), 3), dtype=np.int64)
        self._on_device = torch.zeros(self._table.shape, dtype=torch.int64, device=device)
        self._rows = 0
        self._elements = 0

    @property
    def num_bytes(self) -> int:
        return self._a.nbytes + self._b.nbytes + self._on_device.nbytes

    def add(self, slot: int, weights: GroupWeights) -> None:
        """Append an adapter's A and B, and enter them in the table."""
        ranks = np.array(weights.ranks)
        sizes = ranks * np.array(self._slices.sizes)
        blocks = [block.reshape(-1) for block in weights.b if block is not None]
        self._reserve(slot + 1)
        self._table[slot, :, 0] = ranks
        self._table[slot, :, 1] = self._rows + np.cumsum(ranks) - ranks
        self._table[slot, :, 2] = self._elements + np.cumsum(sizes) - sizes
        self._a = _append(self._a, self._rows, weights.a)
        self._b = _append(self._b, self._elements, torch.cat(blocks))
        self._rows += int(ranks.sum())
        self._elements += int(sizes.sum())
        _copy(self._on_device, torch.from_numpy(self._table))

    def group(self, num_slots: int) -> Group:
        """What the kernels take, once so many slots are in use."""
        self._reserve(num_slots)
        ranks = self._table[..., 0]
        group = Group(
            a=self._a,
            b=self._b,
            table=self._on_device,
            slices=self._slices,
            max_rank=int(ranks.max()),
            max_rows=int(ranks.sum(1).max()),
        )
        group.check_table(self._table)
        return group

    def _reserve(self, num_slots: int) -> None:
        """Make room in the table; slots that do not touch this linear have rank 0 in it."""
        if num_slots > len(self._table):
            more = 1 << (num_slots - 1).bit_length()
            wider = np.zeros((more, *self._table.shape[1:]), dtype=np.int64)
            wider[: len(self._table)] = self._table
            self._table = wider
            self._on_device = torch.empty(wider.shape, dtype=torch.int64, device=self._a.device)
            _copy(self._on_device, torch.from_numpy(wider))


def _append(memory: Tensor, used: int, more: Tensor) -> Tensor:
    """Copy behind what is used; return the memory, or larger memory with the same content."""
    needed = used + len(more)
    if needed > len(memory):
        length = max(needed, int(len(memory) * GROWTH))
        larger = torch.empty(length, *memory.shape[1:], dtype=memory.dtype, device=memory.device)
        larger[:used] = memory[:used]
        memory = larger
    _copy(memory[used:needed], more.to(memory.dtype))
    return memory


def _copy(target: Tensor, source: Tensor) -> None:
    """Begin to copy from the host, from pinned memory: otherwise the host would wait for the end."""
    pinned = source.pin_memory() if target.is_cuda else source
    target.copy_(pinned, non_blocking=True)
