"""Routes for monitors and gateways: health, metrics, version and load; `/state` is what the page shows."""

import asyncio
from importlib.metadata import version
from typing import Literal, NotRequired

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from typing_extensions import TypedDict

from inference_service.api.http.wire.reply import Reply
from inference_service.api.requests.service import GenerationService
from inference_service.driver.telemetry.metrics import CONTENT_TYPE


class Version(TypedDict):
    """The version of loramux."""

    version: str


class Health(TypedDict):
    """The server accepts requests; ``slow`` if torch's operations replace compiled ones."""

    status: Literal["ok", "slow"]
    backend: str
    lack: NotRequired[str]
    """Why: ``no_compiler``, ``not_compiled``, ``wrong_result`` or ``unsupported``."""


class Blocks(TypedDict):
    """Cache blocks."""

    used: int
    total: int


class PrefixTokens(TypedDict):
    """Tokens of prompts, since the start: found in the cache, and looked for there."""

    hit: int
    queried: int


class AtWork(TypedDict):
    """Sequences of a model."""

    running: int
    waiting: int


class State(TypedDict):
    """The load of the whole server, and which of the caller's models have sequences."""

    running: int
    waiting: int
    kv_blocks: Blocks
    prefix_tokens: PrefixTokens
    generated_tokens: int
    models: dict[str, AtWork]


class Load(TypedDict):
    """Requests in work."""

    server_load: int


async def health(service: GenerationService, http: HttpRequest) -> Reply[Health]:  # noqa: ARG001
    """Return 200 while requests are accepted, and why they are slow if so; 503 while the server drains.

    `front` does that, before anything gets here.
    """
    computing = service.local.adapters.facts.computing
    body: Health = {"status": "slow" if computing.lack else "ok", "backend": computing.backend}
    if computing.lack:
        body |= {"lack": computing.lack.value}
    return Reply(body)


async def show_metrics(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
    """Return the metrics in Prometheus' format; a thread writes them, so that requests do not wait."""
    body = await asyncio.to_thread(service.local.metrics.render)
    return Response(body, headers={"content-type": CONTENT_TYPE})


async def show_version(service: GenerationService, http: HttpRequest) -> Reply[Version]:  # noqa: ARG001
    """Return the version of loramux."""
    return Reply({"version": version("loramux")})


async def show_state(service: GenerationService, http: HttpRequest) -> Reply[State]:  # noqa: ARG001
    """Return the load of the whole server, and the caller's models that have sequences."""
    stats = service.local.engine.stats
    return Reply(
        {
            "running": stats.running,
            "waiting": stats.waiting,
            "kv_blocks": {"used": stats.blocks_total - stats.blocks_free, "total": stats.blocks_total},
            "prefix_tokens": {"hit": stats.prefix_tokens_hit, "queried": stats.prefix_tokens_queried},
            "generated_tokens": stats.tokens_generated,
            "models": _at_work(service),
        }
    )


async def show_load(service: GenerationService, http: HttpRequest) -> Reply[Load]:  # noqa: ARG001
    """Return the number of running requests, in vLLM's words."""
    return Reply({"server_load": service.in_work})


def _at_work(service: GenerationService) -> dict[str, AtWork]:
    sequences = service.local.engine.sequence_counts
    found: dict[str, AtWork] = {}
    for model in service.local.catalog:
        name = model.name
        counts: AtWork = {"running": sequences.running.get(name, 0), "waiting": sequences.waiting.get(name, 0)}
        if any(counts.values()):
            found[model.name] = counts
    return found
