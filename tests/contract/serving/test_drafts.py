"""Drafts of a replica: how many tokens they have, and which requests have none."""

import pytest

from inference_service.core.request import Request
from inference_service.replica import Operators
from loramux_shared.bundle.deployments import current_generation, publish_generation
from loramux_shared.settings import InferenceSettings
from loramux_shared.storage.memory import MemoryStore
from tests.support.metrics import Scrape
from tests.support.steps import engine_without_time
from tests.support.tiny import World, make_world, run_engine


@pytest.mark.parametrize(
    ("own", "drafts"),
    [({}, (False, True, False, True)), ({"speculative_tokens": 0}, (False,) * 4)],
    ids=["the deployment", "none of its own"],
)
async def test_a_deployment_says_how_many_unless_the_replica_does(
    own: dict[str, int], drafts: tuple[bool, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each generation counts from the next step on, where a replica has no setting; unsaid, a CPU drafts."""
    world = make_world(tmp_path_factory.mktemp("drafts"), initializer_range=0.02)
    store = world.built()

    def publish(tokens: int | None) -> int:
        newest = current_generation(store, "tiny")
        changed = newest.model_copy(update={"speculative_tokens": tokens})
        return publish_generation(store, changed).number

    publish(0)
    ready = world.load(store, build=engine_without_time(), **own)  # on its clock rows are free
    operators = Operators(InferenceSettings(deployment="tiny", **own), ready)
    ready.engine.start()
    found, before = [], 0.0
    for tokens in (0, 4, 0, None):
        await ready.follower.catch_up(publish(tokens))
        request = Request.of("base", [5, 6, 7, 8] * 8, max_tokens=50, temperature=0, ignore_eos=True)
        assert [event async for event in ready.service.generate(request)]
        drafted = Scrape(ready.service.local.metrics.render().decode()).value("loramux_drafted_tokens_total")
        found.append(drafted > before)
        before = drafted
    await operators.end()
    await ready.engine.stop()
    assert tuple(found) == drafts


def test_what_shapes_its_logits_is_not_drafted(world: tuple[World, MemoryStore]) -> None:
    """A penalty looks at the tokens in between; the answer is that of a replica without drafts."""
    requests = [("base", [5, 6, 7, 8] * 4)]
    answers = []
    for drafts in (0, 6):
        ready = world[0].load(world[1], native=False, speculative_tokens=drafts)
        answers.append(run_engine(ready, requests, 30, presence_penalty=-2.0))
        assert ready.engine.stats.tokens_drafted == 0
    assert answers[0] == answers[1]
