"""All shapes."""

from typing import Final

from tests.golden.wild import kinds, releases, trainers

SHAPES: Final = (*releases.SHAPES, *trainers.SHAPES, *kinds.SHAPES)
