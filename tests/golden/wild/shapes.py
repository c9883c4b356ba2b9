"""Adapters as the releases of PEFT itself and other trainers write them."""

from functools import partial
from itertools import pairwise
from typing import Any, Final

from loramux_shared.extensions import PARTS, find_extensions
from tests.golden.wild.shape import RELEASES, Shape, config_of, made, of_peft
from tests.support.cases import cases

_SPANS: Final = {**{a: a if int(b[2:]) - int(a[2:]) == 1 else f"{a} to 0.{int(b[2:]) - 1}"
                    for a, b in pairwise(RELEASES)}, "0.21": "0.21"}  # fmt: skip


def _shape(writer: str, release: str, what: str, fields: dict[str, Any]) -> Shape:
    for name, make in (("config", lambda of: config_of(**of)), ("tensors", lambda of: partial(made, **of))):
        if fields.get(name) is not None:
            fields[name] = make(fields[name])
    return Shape(writer, release, what, **fields)


OTHERS: Final = [_shape(*row) for row in cases(__file__, "OTHERS") if "kinds" in find_extensions(PARTS)]
"""Adapters of kinds that an extension reads."""
SHAPES: Final = [
    *(Shape("PEFT", _SPANS[name], f"fields of {name}", of_peft(name)) for name in RELEASES),
    *(_shape(*row) for row in cases(__file__, "SHAPES")),
    *OTHERS,
]
