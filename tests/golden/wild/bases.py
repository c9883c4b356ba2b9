"""The bases of the shapes: small ones of transformers."""

from typing import Any, Final

from tests.support.adapters import BASE_CONFIG
from tests.support.cases import cases

_TEXT: Final[dict[str, Any]] = {key: value for key, value in BASE_CONFIG.items() if not key.startswith("arch")}
_SIZES: Final[dict[str, Any]] = {key: value for key, value in _TEXT.items() if key != "model_type"}
_VISION: Final[dict[str, Any]] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
BASES: Final[dict[str, dict[str, Any]]] = cases(__file__, "BASES")
"""Fields of ``config.json``, by name."""
