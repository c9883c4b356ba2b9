from __future__ import annotations

import pytest

from tests.golden.manifests.write import ADAPTERS, FOLDER, manifest


@pytest.mark.parametrize("name", ADAPTERS)
def test_manifests_are_the_same_on_every_machine(name):
    """The same adapter and settings give the same manifest, digests and norms included, byte for byte."""
    assert manifest(name) == (FOLDER / f"{name}.json").read_bytes()
