"""The bases of the shapes: small ones of transformers."""

from typing import Any, Final

from tests.support.cases import cases

BASES: Final[dict[str, dict[str, Any]]] = cases(__file__, "BASES")
"""Fields of ``config.json``, by name."""
