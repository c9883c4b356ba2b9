"""What contract tests share."""

from __future__ import annotations

import pytest

from shared.storage.memory import MemoryStore
from tests.tiny import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, MemoryStore]:
    """A tiny Llama with three adapters, built."""
    world, store = make_world(tmp_path_factory.mktemp("tiny")), MemoryStore()
    world.build(store)
    return world, store
