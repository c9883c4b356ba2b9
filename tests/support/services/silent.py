"""A generation service for tests of the layers before the engine: catalog and tokenizer, no model."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

from inference_service.adapters.catalog import Catalog
from inference_service.api.requests.service import GenerationService
from inference_service.api.requests.terms import ServingLimits
from inference_service.core.served_model import ServedModel
from inference_service.driver.engine_driver import EngineDriver
from inference_service.driver.engine_thread import EngineThread, PauseMode
from inference_service.engine.engine import EngineStats, SequenceCounts
from inference_service.text.text import Text
from tests.support.tokens import VOCAB, write_tokenizer

MODELS = ("base", "all", "rs", "wide")


IDLE = EngineStats(
    waiting=0, running=0, blocks_free=8, blocks_total=8, block_size=16, max_adapters=4, preemptions=0,
    prefix_tokens_queried=0, prefix_tokens_hit=0, tokens_generated=0,
)  # fmt: skip
"""The statistics of an engine that did nothing yet."""


class SilentEngine(SimpleNamespace):
    """Holds nothing, and notes how it is told to pause."""

    paused = False

    async def pause(self, mode: PauseMode = PauseMode.KEEP) -> None:
        self.paused, self.mode = True, mode

    def cut(self) -> None:
        """Do nothing: no stream is open."""

    def resume(self) -> None:
        self.paused = False


def silent_service(folder: Path, catalog: Catalog | None = None) -> GenerationService:
    """A service that lists a base and three adapters, and cannot generate; its tokenizer lies in a folder."""
    write_tokenizer(folder)
    catalog = catalog or Catalog(1, MODELS[0], map(ServedModel, MODELS))
    engine = cast(EngineThread, SilentEngine(max_queue=8, stats=IDLE, sequence_counts=SequenceCounts({}, {})))
    text, limits = Text.load(folder, VOCAB), ServingLimits(64, frozenset({2}))
    driver = EngineDriver(catalog, engine, text, limits.eos_token_ids)
    return GenerationService(driver, text, limits, driver.metrics)
