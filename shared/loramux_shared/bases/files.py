"""The names of the files of a base checkpoint."""

from typing import Final

CONFIG: Final = "config.json"
GENERATION: Final = "generation_config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
GGUF: Final = "model.gguf"
"""The weights where a file of GGUF is the checkpoint (`sources/local.py`)."""
GGUF_SUFFIX: Final = ".gguf"
"""The suffix of a file that is a base, or an adapter, by itself."""
