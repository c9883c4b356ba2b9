"""A replica with every metric."""

import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import httpx

from builder_service.builds.running import RunningBuild
from builder_service.builds.views import BuildState
from builder_service.meter import BuildMeter
from inference_service.adapters.catalog import Catalog
from inference_service.adapters.fixed import fixed_manager
from inference_service.adapters.views import Facts
from inference_service.api.processes.messages import AnswerState
from inference_service.core.adapter import Adapter
from inference_service.core.computing import Computing
from inference_service.core.request import AnswerDelta, AnswerFinished, Request, TokenUsage
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import EndReason, Token
from inference_service.core.served_model import ServedModel
from inference_service.driver.engine_thread import EngineThread
from inference_service.driver.port import Submission
from inference_service.driver.telemetry.metrics import Metrics
from inference_service.driver.telemetry.record import following
from inference_service.engine.engine import SequenceCounts
from loramux_shared.deployment import ModelLimits
from loramux_shared.runtime import Limits
from tests.support.generations import change_deployed
from tests.support.metrics import Scrape
from tests.support.services.silent import IDLE

NAMES = Path(__file__).with_name("names.txt")
MODELS = (ServedModel("base"), ServedModel("pirate", Adapter("ab" * 32, 0), digest="ab" * 32))


def replica(sequences: SequenceCounts, models: tuple[ServedModel, ...] = MODELS) -> Metrics:
    """The metrics of a replica whose engine holds sequences."""
    seen = {"waiting": sum(sequences.waiting.values()), "running": sum(sequences.running.values())}
    stats = replace(IDLE, **seen, blocks_free=6, preemptions=1, prefix_tokens_queried=10, prefix_tokens_hit=5)
    engine = cast(EngineThread, SimpleNamespace(stats=stats, sequence_counts=sequences))
    catalog = Catalog(1, "base", models)
    change_deployed(catalog, limits=ModelLimits(default=Limits(weight=2.0)))
    facts = Facts("", datetime.now(UTC), computing=Computing(token_bytes=2, bytes_per_s=1.0))
    return Metrics(catalog, engine, fixed_manager(catalog, facts))


def everything() -> Scrape:
    metrics = replica(SequenceCounts({}, {}))
    with following(Request.of("pirate", "Hi"), [metrics]) as follower:
        follower.record.model = MODELS[1]
        follower.prepared(Submission(MODELS[1], [1, 2], SamplingParams()))
        follower.submitted([AnswerState(began_s=time.monotonic())], time.monotonic())
        for token in (5, 6):
            follower.see(AnswerDelta("a", (Token(token),)))
        follower.see(AnswerFinished(EndReason.STOP, "", TokenUsage(2, 0, 2)))
    metrics.responded(200)
    return Scrape(metrics.render().decode())


def of_builder() -> Scrape:
    """Return the metrics of a builder once a build has ended."""
    meter = BuildMeter(lambda: 0)
    entry = SimpleNamespace(create_time=datetime.now(UTC))
    meter.ended(cast(RunningBuild, SimpleNamespace(failure=None, state=BuildState.ACTIVE, entry=entry)))
    address = meter.listen("127.0.0.1:0", insecure=False)
    return Scrape(httpx.get(f"http://{address}/metrics").raise_for_status().text)


def names() -> str:
    """The names, types and labels of all metrics, as they are kept; those of the process are the library's."""
    retained = []
    for service, scrape in (("inference", everything()), ("builder", of_builder())):
        retained += [f"{service}: {line}\n" for line in scrape.names() if not line.startswith("process_")]
    return "".join(retained)
