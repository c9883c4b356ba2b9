"""The files of an adapter, which builders fetch and clients upload by pieces, and small files of people."""

import errno
import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from loramux_shared.bundle.manifest import CONFIG_FILE, TEXT_FILES, WEIGHTS_FILE

PIECE: Final = 1 << 20
"""Bytes."""
MAX_SMALL: Final = 1 << 24
"""Most bytes of a file that a person writes."""
CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
INDEX: Final = "adapter_model.safetensors.index.json"
"""Says which tensor is in which file, where the weights are in several."""
SHARD: Final = re.compile(r"adapter_model-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.safetensors")
"""The names of those."""
MODEL_CONFIG: Final = "config.json"
"""The model's config in transformers; an adapter that classifies has the names of its labels there."""
ADAPTER_GGUF: Final = "adapter.gguf"
"""The weights where a file of GGUF is the adapter (`sources/local.py`)."""
GGUF_FILE: Final = re.compile(r"[\w\-+][\w.\-+]{0,200}\.gguf", re.ASCII)
"""The names of files of llama.cpp, of which one is an adapter by itself."""
KEYS_FILE: Final = "model.lora_keys.npy"
"""The older name of the config file of TensorRT-LLM's converters."""
TOKEN_FILES: Final = ("added_tokens.json", "tokenizer.json", "tokenizer_config.json")
"""Looked at where they are there, for tokens that the base does not have."""


def weight_files(names: Collection[str]) -> tuple[str, ...]:
    """Return the files that a bundle's rows are made from: PEFT's, two of a TensorRT-LLM converter, or the one
    of llama.cpp's.
    """
    config = next((name for name in (CONFIG_FILE, KEYS_FILE) if name in names), None)
    if CONFIG not in names and config is not None and WEIGHTS_FILE in names:
        return (WEIGHTS_FILE, config)
    packed = list(filter(GGUF_FILE.fullmatch, names))
    if len(packed) == 1 and not {CONFIG, WEIGHTS, MODEL_CONFIG}.intersection(names):
        return (packed[0],)
    if WEIGHTS in names or INDEX not in names:
        return (CONFIG, WEIGHTS)
    return (CONFIG, *sorted(filter(SHARD.fullmatch, names)), INDEX)


def wanted_files(names: Collection[str]) -> list[str]:
    """Return the files that are fetched of an adapter without findings; nothing else is looked at."""
    beside = sorted({*TOKEN_FILES, *TEXT_FILES, MODEL_CONFIG} & set(names))
    return [*weight_files(names), *beside]


def holds_weights(name: str) -> bool:
    """True for a file whose size follows from the adapter's."""
    return name in (WEIGHTS, WEIGHTS_FILE) or any(each.fullmatch(name) for each in (SHARD, GGUF_FILE))


def pieces_of(path: Path) -> Iterator[bytes]:
    """Yield a regular file's content; a pipe or a device that took its place is not waited for."""
    with open(path, "rb", opener=_at_once) as source:
        if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        while piece := source.read(PIECE):
            yield piece


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def read_small(path: Path) -> bytes:
    """Return the content of a file that a person writes: settings, keys, certificates. Raise OSError where it
    cannot be read, or has more bytes than such a file has.
    """
    with path.open("rb") as file:
        content = file.read(MAX_SMALL + 1)
    if len(content) > MAX_SMALL:
        raise OSError(errno.EFBIG, f"it has more than {MAX_SMALL >> 20} MiB")
    return content
