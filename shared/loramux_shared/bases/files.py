"""The names of the files of a base checkpoint."""

import re
from collections.abc import Iterable
from typing import Final

CONFIG: Final = "config.json"
GENERATION: Final = "generation_config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
GGUF: Final = "model.gguf"
"""The weights where a file of GGUF is the checkpoint (`sources/local.py`)."""
_GGUF_PART: Final = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.gguf")
"""The names of the weights where they are in several."""
GGUF_SUFFIX: Final = ".gguf"
"""The suffix of a file that is a base, or an adapter, by itself."""


def gguf_files(names: Iterable[str]) -> list[str]:
    """Return the files among those of a checkpoint that are its weights in GGUF; none where it has others."""
    return sorted(name for name in names if name == GGUF or _GGUF_PART.fullmatch(name))
