"""The driver of an API process: names, limits, grammars and the engine are in the engine's process."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from inference_service.adapters.catalog import Catalog
from inference_service.adapters.names import defaults_of
from inference_service.adapters.texts import AdapterTexts, Scorer
from inference_service.api.processes import messages
from inference_service.api.processes.channel import GONE, Channel
from inference_service.api.requests.service import GenerationService, ParsersOf
from inference_service.api.requests.terms import ServingLimits
from inference_service.core.adapter import Adapter
from inference_service.core.request import Request, ResolvedModel
from inference_service.core.served_model import AdapterDefaults, ServedModel
from inference_service.driver.delivery import SLICE, Delivery, Outputs
from inference_service.driver.port import Submission
from inference_service.driver.telemetry.metrics import RequestMetrics
from inference_service.driver.telemetry.record import Watcher
from inference_service.store import Batches
from inference_service.text.chat_template import ChatTemplate
from inference_service.text.text import Pairs, Text
from loramux_shared.access.keys import ACCESS
from loramux_shared.bundle.manifest import ScoreHead
from loramux_shared.bundle.npy import Array
from loramux_shared.faults import Fault, ReplicaFailed, fault_from
from loramux_shared.runtime import Pooling, ReasoningParser, tool_parser_of


def served_to(service: GenerationService) -> dict[str, Any]:
    """Return what an API process must know of a service, as a message has it."""
    text, limits = service.text, service.limits
    return {
        "tokenizer": text.tokenizer_json(),
        "template": None if text.template is None else text.template.source,
        "vocab": text.vocab,
        "special": text.special_tokens,
        "pairs": asdict(text.pairs),
        "limits": asdict(limits) | {"eos_token_ids": list(limits.eos_token_ids)},
        "max_queue": service.max_queue,
        "pooling": service.pooling_of_base,
        "prompts": dict(service.prompts_of_base),
        "logprobs_mode": service.logprobs_mode,
        "deployed": deployed_to(service.local.catalog),
    }


def deployed_to(catalog: Catalog) -> dict[str, Any]:
    """Return what a generation says about requests, as a message has it."""
    return {each.name: getattr(catalog.deployed, each.name) for each in fields(RemoteTerms)}


@dataclass(frozen=True)
class RemoteTerms:
    """The terms of the served generation for requests."""

    served_model_name: str
    request_default_max_tokens: int | None
    tool_parser: str
    reasoning_parser: ReasoningParser
    pooling: Pooling | None

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> RemoteTerms:
        """Return those of a message."""
        return cls(
            **{
                **message,
                "tool_parser": tool_parser_of(message["tool_parser"]),
                "reasoning_parser": ReasoningParser(message["reasoning_parser"]),
                "pooling": messages.pooling_from(message["pooling"]),
            }
        )


class RemoteDriver:
    """Gives requests to the engine's process, and hands outputs to the streams of their sequences."""

    def __init__(self, channel: Channel, text: Text, served: Mapping[str, Any]) -> None:
        """Take outputs and generations from a channel; served is what `served_to` returns."""
        self.max_queue: int = served["max_queue"]
        self.deployed = RemoteTerms.of(served["deployed"])
        self._channel = channel
        self._texts = AdapterTexts(RemoteReader(channel), text)
        self._numbers = itertools.count()
        self._open: dict[int, tuple[Outputs, Mapping[str, messages.AnswerState], set[int]]] = {}
        """Requests, with the progress of their answers, and the places of those that ended, which the engine's
        process has let go.
        """
        self._delivery = Delivery()
        self._stopped: Fault | None = None
        channel.handlers |= {"out": self._take, "end": self._fail, "deployed": self._deploy}

    async def choose(self, request: Request) -> ResolvedModel:
        """Return what answers a request; raise what `Naming.choose` does."""
        rights = messages.access_to(ACCESS.get())
        order = messages.reference_to(request.model), request.scheduling.deadline_s, rights
        model, generation = await self._channel.ask("choose", *order)
        return ResolvedModel(messages.model_from(model, _handle), generation)

    def admit(self, _model: ServedModel) -> AbstractContextManager[RemoteDriver]:
        """Let a request in: the engine's process has the limits, and looks when it is submitted."""
        return nullcontext(self)

    async def defaults(self, model: ServedModel) -> AdapterDefaults:
        """Return what an adapter brings beside its weights, or raise why it cannot be read."""
        return await defaults_of(model, lambda each: self._texts.defaults(each.digest, each.name))

    async def scorer(self, model: ServedModel) -> Scorer:
        """Return the score head of a model that classifies, or raise what `AdapterTexts.scorer` does."""
        return await self._texts.scorer(model.digest)

    async def submit(self, submission: Submission) -> Outputs:
        """Put the answers of a request in the engine's queue; the caller must close what it gets.

        Raises:
            Fault: what the limits and `EngineThread.submit` raise.
        """
        if self._stopped is not None:
            raise self._stopped.copy()
        number = next(self._numbers)
        places = {f"{number}.{place}": place for place in range(submission.n)}
        views = {seq_id: messages.AnswerState() for seq_id in places}
        outputs = Outputs(views, lambda seq_id: self._close(number, places[seq_id]))
        self._open[number] = outputs, views, set()
        self._delivery.came = True
        order = messages.access_to(ACCESS.get()), messages.submission_to(submission)
        try:
            await self._channel.ask("submit", number, *order)
        except BaseException:
            outputs.close()  # the engine may have begun
            raise
        return outputs

    def end(self) -> None:
        """End every request, since the engine's process is gone, and refuse new ones."""
        self._stopped = self._stopped or ReplicaFailed(GONE)
        for outputs, *_ in list(self._open.values()):
            outputs.fail(self._stopped.copy())

    def _take(self, batch: Sequence[tuple[int, int, Sequence[Any]]]) -> None:
        """Hand the outputs of a step to their streams."""
        paced = len(self._open) > SLICE
        for number, place, items in batch:
            found = self._open.get(number)
            if found is None:
                continue
            stream, states, ended = found
            seq_id = f"{number}.{place}"
            outputs = [messages.output_from(item, seq_id, states[seq_id]) for item in items]
            stream.put(seq_id, outputs)
            if outputs[-1].finish is not None:
                ended.add(place)
            if paced:
                self._delivery.add(stream, urgent=outputs[0].first or outputs[-1].finish is not None)
            else:
                stream.wake()
        self._delivery.begin()

    def _fail(self, number: int, fault: Sequence[Any]) -> None:
        """End one request with a fault."""
        if number in self._open:
            self._open[number][0].fail(fault_from(fault))

    def _deploy(self, deployed: Mapping[str, Any]) -> None:
        """Take over what a generation says about requests."""
        self.deployed = RemoteTerms.of(deployed)

    def _close(self, number: int, place: int) -> None:
        outputs, _, ended = self._open[number]
        if place not in ended:
            self._channel.say("drop", number, place)
        if not outputs.open:
            del self._open[number]


class RemoteReader:
    """Reads what adapters bring beside weights through the engine's process; called on threads of readers."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._loop = asyncio.get_running_loop()

    def texts(self, digest: str) -> dict[str, bytes]:
        """Return a bundle's text files."""
        found: dict[str, bytes] = self._ask("texts", digest)
        return found

    def score(self, digest: str) -> tuple[ScoreHead, Array]:
        """Return a bundle's score head, and its weights."""
        head, weights = self._ask("score", digest)
        made = ScoreHead.model_validate_json(head)
        return made, np.frombuffer(weights, np.float32).reshape(made.shape)

    def _ask(self, name: str, digest: str) -> Any:
        return asyncio.run_coroutine_threadsafe(self._channel.ask(name, digest), self._loop).result()


class CollectedSeries:
    """Counters and observations until they are handed over."""

    def __init__(self) -> None:
        self._counted: Counter[tuple[str, str, str]] = Counter()
        self._seconds: list[tuple[str, str, float]] = []

    def count(self, name: str, model: str, amount: int = 1, label: str = "") -> None:
        """Add to a counter."""
        self._counted[name, model, label] += amount

    def observe(self, name: str, model: str, seconds: float) -> None:
        """Add to a histogram."""
        self._seconds.append((name, model, seconds))

    def take(self) -> list[Any]:
        """Return what was counted and observed since the last time."""
        found = [[[*key, amount] for key, amount in self._counted.items()], self._seconds]
        self._counted, self._seconds = Counter(), []
        return found


class CollectedMetrics(RequestMetrics):
    """Counts requests, and hands over what it counted."""

    def __init__(self) -> None:
        self._collected = CollectedSeries()
        self._statuses: Counter[int] = Counter()
        super().__init__(self._collected)

    def responded(self, status: int) -> None:
        """Count an answer of the HTTP server."""
        self._statuses[status] += 1

    def take(self) -> list[Any]:
        """Return what was counted since the last time."""
        statuses, self._statuses = dict(self._statuses), Counter()
        return [*self._collected.take(), statuses]


@dataclass(frozen=True)
class RemoteApi:
    """The service of an API process, and what the engine's process asks of it."""

    channel: Channel
    service: GenerationService
    driver: RemoteDriver
    metrics: CollectedMetrics

    @classmethod
    def open(
        cls,
        channel: Channel,
        served: Mapping[str, Any],
        parsers_of: ParsersOf,
        watchers: Sequence[Watcher] = (),
        batches: Batches | None = None,
    ) -> RemoteApi:
        """Begin with what `served_to` returns."""
        source, special, vocab = served["template"], served["special"], served["vocab"]
        template = ChatTemplate(source, special) if source else None
        text = Text.from_json(served["tokenizer"], template, vocab, special, Pairs(**served["pairs"]))
        limits = served["limits"]
        driver, metrics = RemoteDriver(channel, text, served), CollectedMetrics()
        service = GenerationService(
            driver,
            text,
            ServingLimits(**limits | {"eos_token_ids": frozenset(limits["eos_token_ids"])}),
            metrics,
            watchers,
            pooling_of_base=messages.pooling_from(served["pooling"]),
            prompts_of_base=served["prompts"],
            parsers_of=parsers_of,
            logprobs_mode=served["logprobs_mode"],
            batches=batches,
        )
        return cls(channel, service, driver, metrics)

    async def collect(self) -> None:
        """Say what was counted since the last time: an answer may find that nobody waits for it any more."""
        self.channel.say("count", self.service.in_work, *self.metrics.take())


def _handle(digest: str, invocation: tuple[int, ...]) -> Adapter:
    return Adapter(digest, invocation=invocation)
