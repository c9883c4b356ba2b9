"""All shapes."""

from typing import Final

from loramux_shared.extensions import PARTS, find_extensions
from tests.golden.wild import kinds, releases, trainers

OTHERS: Final = kinds.SHAPES if "kinds" in find_extensions(PARTS) else ()
"""Adapters of kinds that an extension reads."""
SHAPES: Final = (*releases.SHAPES, *trainers.SHAPES, *OTHERS)
