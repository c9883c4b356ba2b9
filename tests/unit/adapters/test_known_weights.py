"""Weights that were verified once are known again, and only those."""

from __future__ import annotations

import hashlib

import pytest

from inference_service.adapters.reading import KnownWeights
from loramux_shared.bundle.manifest import CONFIG_FILE, WEIGHTS_FILE, FileDigest
from loramux_shared.faults import BundleCorrupt

DATA = bytes(range(256)) * 40
FILES = {
    name: FileDigest(size=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())
    for name in (WEIGHTS_FILE, CONFIG_FILE)
}
DIGEST = "d" * 64


@pytest.mark.parametrize("damaged", [DATA[:-1], DATA + b"\0", b"", DATA[:99] + b"?" + DATA[100:]])
@pytest.mark.parametrize("before", [0, 1, 2])
def test_damage_is_found_whatever_came_before(damaged: bytes, before: int) -> None:
    """Damage is found before and after the first good read, and damaged data never becomes known."""
    weights = KnownWeights()
    for _ in range(before):
        weights.verify(DATA, FILES, WEIGHTS_FILE, DIGEST)
    for _ in range(2):
        with pytest.raises(BundleCorrupt, match="expected"):
            weights.verify(damaged, FILES, WEIGHTS_FILE, DIGEST)
    weights.verify(DATA, FILES, WEIGHTS_FILE, DIGEST)
