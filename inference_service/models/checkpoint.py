"""Tensors of a checkpoint in safetensors, single or sharded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shared.faults import CheckpointInvalid

INDEX = "model.safetensors.index.json"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Tensors(Protocol):
    """Where a decoder's weights come from."""

    dtype: torch.dtype
    device: torch.device

    def first(self, names: Sequence[str]) -> str:
        """Return the first name that is there; the first at all when none is, for the message of `get`."""
        ...

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor of that shape, of the dtype and on the device.

        Raises:
            CheckpointInvalid: there is none.
        """
        ...


class Checkpoint:
    """Reads tensors by name; each is read from disk when it is asked for."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._where: dict[str, Path] = {}
        for path in _files(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    self._where |= dict.fromkeys(file.keys(), path)
            except (SafetensorError, OSError) as error:
                raise CheckpointInvalid(f"{path.name} is not a readable safetensors file: {error}") from error

    def first(self, names: Sequence[str]) -> str:
        """Return the first name that is there; the first at all when none is, for the message of `get`."""
        return next((name for name in names if name in self._where), names[0])

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor in the serving dtype.

        Raises:
            CheckpointInvalid: it is not there, or has another shape, or is quantised.
        """
        if name not in self._where:
            raise CheckpointInvalid(f"the base checkpoint lacks the tensor {name}. Is the download complete?")
        with safe_open(self._where[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise CheckpointInvalid(f"{name}: config.json implies shape {shape}, found {tuple(tensor.shape)}.")
        if tensor.dtype not in DTYPES:
            found = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointInvalid(f"{name}: {found} is not supported; supported: bfloat16, float16, float32.")
        return tensor.to(self.device, self.dtype)


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise CheckpointInvalid(f"the base checkpoint has neither model.safetensors nor {INDEX}.")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointInvalid(f"{INDEX} is no index: expected an object with weight_map.") from error
    missing = [name for name in names if Path(name).name != name or not (folder / name).exists()]
    if missing:
        raise CheckpointInvalid(f"{INDEX} names {missing[0]}, which is not in the checkpoint.")
    return [folder / name for name in names]
