"""What the tests of gateways share."""

from __future__ import annotations

import pytest

from tests.support.openai_door import openai_world
from tests.support.served_replicas import Built


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A tiny Llama with a chat template and three adapters, built; nobody may change its store."""
    return openai_world(tmp_path_factory.mktemp("gateways"))
