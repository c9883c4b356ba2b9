"""The soak of benchmarks/soak.py, short."""

from pathlib import Path

import pytest

from benchmarks.soak import soak


@pytest.mark.sweep
async def test_a_replica_keeps_its_promises_under_everything(tmp_path: Path) -> None:
    """Twenty seconds of good, bad, cancelled, slow and broken requests: each ends once, and nothing is held."""
    promises = await soak(tmp_path, minutes=1 / 3, concurrency=8)
    assert not [each for each in promises if not each.kept]
