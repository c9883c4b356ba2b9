"""All exhibits."""

from loramux_shared.extensions import PARTS, find_extensions
from tests.golden.hostile import configs, files, headers, keys, kinds

OTHERS = (kinds,) if "kinds" in find_extensions(PARTS) else ()
"""Adapters of kinds that an extension reads."""

EXHIBITS = tuple(
    exhibit
    for hall in (configs, files, headers, keys, *OTHERS)
    for exhibits in (hall.REFUSED, hall.ACCEPTED)
    for exhibit in exhibits
)
