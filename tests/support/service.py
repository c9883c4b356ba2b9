"""A loaded service, without an API."""

from typing import Any

from inference_service.core.request import AnswerDelta, Event, Request
from inference_service.startup.load import Ready
from loramux_shared.storage.memory import MemoryStore
from tests.support.tiny import World
from tests.support.waiting import until

PROMPT = [5, 6, 7, 8]


async def until_free(ready: Ready) -> None:
    """Wait until the engine holds no sequence and no block."""

    def free() -> bool:
        stats = ready.engine.stats
        return not stats.running and not stats.waiting and stats.blocks_free == stats.blocks_total

    await until(free, "the engine to hold no sequence and no block", lambda: ready.engine.stats)


class Service:
    """A loaded service."""

    def __init__(self, ready: Ready) -> None:
        self.ready = ready

    async def events(self, prompt: Any = PROMPT, model: str = "base", **fields: Any) -> list[Event]:
        return [event async for event in self.ready.service.generate(Request.of(model, prompt, **fields))]

    async def answers(self, prompt: Any = PROMPT, **fields: Any) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for event in await self.events(prompt, **fields):
            if isinstance(event, AnswerDelta):
                found.setdefault(event.index, []).extend(token.id for token in event.tokens)
        return [found[index] for index in range(len(found))]

    async def until_free(self) -> None:
        await until_free(self.ready)

    async def close(self) -> None:
        await self.until_free()
        await self.ready.engine.stop()


async def open_service(world: tuple[World, MemoryStore], **settings: Any) -> Service:
    ready = world[0].load(world[1], **({"stream_interval_ms": 0} | settings))
    ready.engine.start()
    return Service(ready)
