"""Names, loads and generations together, under an engine that only counts: nobody gets another's digest."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from inference_service.serving.adapters.follower import Follower
from inference_service.serving.adapters.loader import AdapterLoader, Loaded
from inference_service.serving.adapters.reading import BundleReader
from loramux_shared.bundle.deployments import current_generation, publish_generation
from loramux_shared.bundle.generation import Generation
from tests.support.bundles import FakePacked, Handle, Unsteady, build_bundles


async def test_generations_come_and_go_under_requests(tmp_path: Path) -> None:
    """Each request gets the digest that its name had when it came, whatever was published meanwhile."""
    store = Unsteady()
    digests = build_bundles(store, tmp_path, 6)
    first = current_generation(store, "tiny")
    assert first is not None
    store.latency_s = 0.002
    names = {name: record.digest for name, record in first.adapters.items()}
    loader = AdapterLoader(BundleReader(store, None), FakePacked, host_bytes=3000)
    loop, draw, wrong = asyncio.get_running_loop(), random.Random(5), list[str]()

    def take(generation: Generation) -> None:
        names.clear()
        names.update((name, record.digest) for name, record in generation.adapters.items())

    async def ask() -> None:
        digest = names[draw.choice(sorted(names))]
        outcome = loop.create_future()
        loader.load(Handle(digest), lambda found: loop.call_soon_threadsafe(outcome.set_result, found))
        found = await asyncio.wait_for(outcome, 20)
        if not isinstance(found, Loaded) or found.packed.bundle.digest != digest:
            wrong.append(digest)

    follower = Follower(store, first, take, interval_s=0.01, spacing_s=0.0)
    following = asyncio.create_task(follower.run())
    asked = []
    for number in range(20):
        kept = draw.sample(sorted(first.adapters), draw.randint(1, 6))
        records = [first.adapters[f"a{draw.randrange(6)}"] for _ in kept]
        changed = first.model_copy(update={"adapters": dict(zip(kept, records, strict=True))})
        published = await asyncio.to_thread(publish_generation, store, changed)
        asked += [asyncio.create_task(ask()) for _ in range(10)]
        if number % 4 == 0:
            await follower.catch_up(published.number)
            assert names == {name: record.digest for name, record in published.adapters.items()}
    await asyncio.gather(*asked)
    await follower.catch_up(published.number)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    follower.close()
    loader.close()
    assert not wrong
    assert follower.standing.generation == published.number
    assert set(names.values()) <= set(digests)
