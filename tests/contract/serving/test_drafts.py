"""The number of drafted tokens: the deployment's current value, unless the replica has its own."""

from typing import Any

import pytest

from inference_service.replica import Operators
from inference_service.serving.request import Request
from inference_service.startup.load import Ready
from loramux_shared.bundle.deployments import current_generation, publish_generation
from loramux_shared.settings import InferenceSettings
from loramux_shared.storage.memory import MemoryStore
from tests.support.metrics import Scrape
from tests.support.tiny import World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("drafts"), initializer_range=0.02)


class Replica:
    """A replica of a deployment whose runtime changes."""

    def __init__(self, world: World, text: int | None, **settings: Any) -> None:
        self._store = MemoryStore()
        world.build(self._store)
        self.publish(text)
        self._ready: Ready = world.load(self._store, **settings)
        self._ready.engine._engine._clock = lambda: 0.0  # rows are free
        self._operators = Operators(InferenceSettings(deployment="tiny", **settings), self._ready)
        self._ready.engine.start()

    def publish(self, speculative_tokens: int | None) -> int:
        """Publish a generation; return its number."""
        newest = current_generation(self._store, "tiny")
        changed = newest.model_copy(update={"speculative_tokens": speculative_tokens})
        return publish_generation(self._store, changed).number

    async def follow(self, speculative_tokens: int | None) -> None:
        """Publish, and take it over."""
        await self._ready.follower.catch_up(self.publish(speculative_tokens))

    async def drafted(self) -> float:
        """Return the tokens that were drafted for a request whose answer repeats itself."""
        before = self._count()
        request = Request.of("base", [5, 6, 7, 8] * 8, max_tokens=50, temperature=0, ignore_eos=True)
        async for _ in self._ready.service.generate(request):
            pass
        return self._count() - before

    def _count(self) -> float:
        metrics = Scrape(self._ready.service.metrics.render().decode())
        return metrics.value("loramux_drafted_tokens_total")

    async def stop(self) -> None:
        """Let everything go."""
        await self._operators.end()
        await self._ready.engine.stop()


@pytest.mark.parametrize(
    ("own", "expected", "drafts"),
    [
        (None, (0, 4, 0, None), (False, True, False, True)),
        (0, (4, None, 4), (False,) * 3),
        (4, (0, None, 0), (True,) * 3),
    ],
    ids=["the deployment", "none of its own", "four of its own"],
)
async def test_a_deployment_says_how_many_unless_the_replica_does(
    world: World, own: int | None, expected: tuple[int | None, ...], drafts: tuple[bool, ...]
) -> None:
    """Each generation counts from the next step on, where a replica has no setting; unsaid, a CPU drafts."""
    replica = Replica(world, expected[0], **({} if own is None else {"speculative_tokens": own}))
    found = [await replica.drafted()]
    for tokens in expected[1:]:
        await replica.follow(tokens)
        found.append(await replica.drafted())
    await replica.stop()
    assert tuple(drafted > 0 for drafted in found) == drafts
