"""All exhibits."""

from tests.golden.hostile import configs, files, headers, keys, kinds

EXHIBITS = tuple(
    exhibit
    for hall in (configs, files, headers, keys, kinds)
    for exhibits in (hall.REFUSED, hall.ACCEPTED)
    for exhibit in exhibits
)
