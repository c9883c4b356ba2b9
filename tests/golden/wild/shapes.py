"""All shapes."""

from typing import Final

from tests.golden.wild import releases, trainers

SHAPES: Final = (*releases.SHAPES, *trainers.SHAPES)
