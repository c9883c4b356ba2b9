"""Tensors of a checkpoint in safetensors, single or sharded."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from inference_service.engine.models import gguf
from inference_service.engine.models.lowbit.find import Found
from inference_service.engine.models.packed import (
    FLOATS,
    Integers,
    Keepable,
    Kept,
    Packed,
    PackedWeights,
    Pieces,
    widened,
)
from inference_service.engine.models.shard import Shard, ShardInvalid, read_shard
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.files import GGUF_SUFFIX, gguf_files
from loramux_shared.bases.unused import unknown
from loramux_shared.bases.weight_format import Quantization
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.faults import CheckpointInvalid
from loramux_shared.sources.files import hash_if_there
from loramux_shared.untrusted_json import JsonInvalid, parse_json
from loramux_shared.wording import counted, listed

INDEX = "model.safetensors.index.json"
Verify = Callable[[str, FileDigest | None], None]
"""Told what was read of a file, by its name, or that none is there; raises unless that is what was meant."""


class Tensors(Protocol):
    """A source of a decoder's weights."""

    dtype: torch.dtype
    device: torch.device

    def has(self, name: str) -> bool:
        """Return True if there is such a tensor."""
        ...

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor that is not of few bits; None where there is none."""
        ...

    def first(self, names: Sequence[str]) -> str:
        """Return the first name that is there; the first at all when none is, for the message of `get`."""
        ...

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor of that shape, of the dtype and on the device; raise CheckpointInvalid if none is
        there.
        """
        ...

    def kept(self, names: Sequence[tuple[str, tuple[int, ...]]], kind: type[Kept]) -> list[Kept] | None:
        """Return weights of few bits as products take them, not by `get`; None where one is of another kind.
        Raise CheckpointInvalid where the tensors of a weight do not go together.
        """
        ...


def unverified(_name: str, _found: FileDigest | None) -> None:
    """Take a file as it is."""


class Checkpoint:
    """Reads tensors by name, each to be asked for once.

    A file is read whole, into memory of its own, when a tensor of it is asked for, and verified before the
    first of them is given out; what was given out is no longer held here. So beside the model one file is in
    memory while it is loaded, or two where a layer begins in one and ends in another.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        verify: Verify = unverified,
        quantization: Quantization | None = None,
    ) -> None:
        """Read a folder; quantization says how weights are kept that are widened to the dtype."""
        self.dtype = dtype
        self.device = device
        self._verify = verify
        self._quantization = quantization
        self._where: dict[str, Path] = {}
        self._held: dict[str, Tensor] = {}
        self._read: Callable[[Path], Shard] = read_shard
        self._opened: dict[str, Packed] = {}
        """Weights of few bits that were looked at, and will be widened."""
        self._others: dict[str, str] = {}
        self._found: PackedWeights | None = None
        self._taken: set[str] = set()
        for path in _files(folder, verify):
            if path.suffix == GGUF_SUFFIX:
                self._where |= dict.fromkeys(gguf.names_of(path), path)
                self._read, self._found = gguf.read_gguf, gguf.FoundBlocks(self._where)
                continue
            try:
                with safe_open(path, framework="pt") as file:
                    self._where |= dict.fromkeys(file.keys(), path)
            except (SafetensorError, OSError) as error:
                self._refuse(path, error)
        if quantization is not None and self._found is None:
            self._found = Found(quantization.format, self._where)

    def has(self, name: str) -> bool:
        """Return True if there is such a tensor, whole or of few bits."""
        return name in self._where or (self._found is not None and name in self._found)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor that is not of few bits; None where there is none."""
        path = self._where.get(name)
        if path is None or path.suffix == GGUF_SUFFIX:
            return None
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def first(self, names: Sequence[str]) -> str:
        """Return the first name that is there; the first at all when none is, for the message of `get`."""
        return next((name for name in names if self.has(name)), names[0])

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor in the serving dtype or another, widened if it is of few bits. Raise
        CheckpointInvalid where it is missing, of another shape or kept otherwise, and what verify does.
        """
        packed = self._opened.pop(name, None) or self.packed(name, shape)
        if packed is not None:
            return widened(packed, dtype or self.dtype).to(self.device)
        tensor = self._take(name)
        if tensor.dtype not in FLOATS:
            raise CheckpointInvalid(
                f"{name}: {str(tensor.dtype).removeprefix('torch.')} is not supported; supported: bfloat16, "
                "float16, float32, and what a quantization_config describes, with its scales beside it."
            )
        if tuple(tensor.shape) != shape:
            raise CheckpointInvalid(f"{name}: config.json implies shape {shape}, found {tuple(tensor.shape)}.")
        return tensor.to(self.device, dtype or self.dtype)

    def kept(self, names: Sequence[tuple[str, tuple[int, ...]]], kind: type[Kept]) -> list[Kept] | None:
        """Return weights of few bits as products take them; `get` widens them where this returns None. Raise
        CheckpointInvalid where the tensors of a weight do not go together, and what verify does.
        """
        found = []
        for name, shape in names:
            packed = self.packed(name, shape)
            if packed is None:
                return None
            self._opened[name] = packed
            kept = packed.kept() if isinstance(packed, Keepable) else None
            if not isinstance(kept, kind):
                return None
            found.append(kept)
        # Integers are one weight, with one group size.
        if len({each.scales.shape[1] for each in found if isinstance(each, Integers)}) > 1:
            return None
        for name, _ in names:
            del self._opened[name]
        return [each.to(self.device) if isinstance(each, Integers) else each for each in found]

    def packed(self, name: str, shape: tuple[int, ...]) -> Packed | None:
        """Return a weight of few bits as the file keeps it, instead of `get`; None where it is kept as it is.
        Raise CheckpointInvalid where its tensors do not go together, and what verify does.
        """
        if self._quantization is None or self._found is None or name not in self._found:
            return None
        tensors = {role: self._take(each) for role, each in self._found.parts(name).items()}
        return self._found.open(Pieces(name, shape, self._quantization, tensors))

    def _take(self, name: str) -> Tensor:
        """Return a tensor as the file has it."""
        if name not in self._where:
            raise CheckpointInvalid(f"the base checkpoint lacks the tensor {name}. Is the download complete?")
        if name not in self._held and name not in self._others:
            self._load(self._where[name])
        if name in self._others:
            raise CheckpointInvalid(
                f"{name}: {self._others[name]} is not supported; supported: bfloat16, float16, float32, and "
                "what is read of a quantization_config."
            )
        self._taken.add(name)
        return self._held.pop(name)

    def require_used(self, config: ModelConfig) -> None:
        """Raise CheckpointInvalid where a tensor was not asked for, once the whole base was read.

        A base may have parts beside those that are served, and biases of zeros, as AutoGPTQ saves them.
        """
        left = unknown(self._where.keys() - self._taken, config)
        if names := [name for name in left if not self._is_zero_bias(name)]:
            raise CheckpointInvalid(
                f"the base has {counted(len(names), 'tensor')} that {config.architecture} does not use as "
                f"config.json describes it, and would answer without them: {listed(names)}. Correct it, or "
                "choose a base whose tensors it describes."
            )

    def _is_zero_bias(self, name: str) -> bool:
        return name.endswith(".bias") and not self._take(name).any()

    def _load(self, path: Path) -> None:
        try:
            shard = self._read(path)
        except (ShardInvalid, OSError) as error:
            self._refuse(path, error)
        self._verify(path.name, shard.digest)
        names = {name for name, where in self._where.items() if where == path}
        if names != {*shard.tensors, *shard.others}:
            self._refuse(path, "it changed while it was read")
        self._held |= shard.tensors
        self._others |= shard.others

    def _refuse(self, path: Path, error: Exception | str) -> NoReturn:
        """Refuse a file that cannot be read: because it is another one than was meant, or as it is."""
        self._verify(path.name, hash_if_there(path))
        raise CheckpointInvalid(f"{path.name} is not a readable safetensors file: {error}")


def _files(folder: Path, verify: Verify) -> list[Path]:
    index = folder / INDEX
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists() and (blocks := gguf_files(path.name for path in folder.iterdir())):
            return [folder / name for name in blocks]
        if not single.exists():
            for absent in (index, single):
                verify(absent.name, None)
            raise CheckpointInvalid(f"the base checkpoint has neither model.safetensors nor {INDEX}.")
        return [single]
    try:
        names = sorted(set(parse_json(index.read_bytes())["weight_map"].values()))
    except (JsonInvalid, KeyError, AttributeError, TypeError) as error:
        raise CheckpointInvalid(f"{INDEX} is no index: expected an object with weight_map.") from error
    for name in names:
        plain = Path(name).name == name
        if not plain or not (folder / name).exists():
            if plain:
                verify(name, None)
            raise CheckpointInvalid(f"{INDEX} names {name}, which is not in the checkpoint.")
    return [folder / name for name in names]
