"""The triton backend end to end, in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramux_shared.storage.memory import MemoryStore
from tests.support.tiny import ADAPTERS, make_world, run_engine


@pytest.mark.parametrize("max_batch_tokens", [pytest.param(1024, marks=pytest.mark.sweep), 16])
def test_the_triton_backend_gives_the_tokens_of_the_torch_backend(
    tmp_path: Path, max_batch_tokens: int
) -> None:
    """Base and three adapters of mixed ranks in one batch, prefill (whole or in chunks) and decode."""
    world = make_world(tmp_path)
    store = MemoryStore()
    world.build(store, max_lora_rank=16)
    requests = [
        (name, [7 + 3 * index + place for place in range(5 + 9 * index)])
        for index, name in enumerate(("base", *ADAPTERS, "base"))
    ]
    answers = [
        run_engine(world.load(store, backend=backend, max_batch_tokens=max_batch_tokens), requests, 5)
        for backend in ("torch", "triton")
    ]
    assert answers[0] == answers[1]
