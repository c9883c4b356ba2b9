"""Generation in an API process: texts, templates and answers here, names, limits and the engine elsewhere."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, cast

import numpy as np

from inference_service.adapters.catalog import Catalog
from inference_service.adapters.reading import BundleReader
from inference_service.adapters.served_model import ServedModel
from inference_service.adapters.texts import AdapterTexts
from inference_service.apis import messages
from inference_service.apis.channel import GONE, Channel
from inference_service.core.adapter import Adapter
from inference_service.core.constraint import Grammar
from inference_service.core.sequence import FAIR, Sequence
from inference_service.serving.delivery import SLICE, Delivery, Outputs
from inference_service.serving.engine_thread import EngineThread
from inference_service.serving.limits import Ticket
from inference_service.serving.naming import Naming
from inference_service.serving.request import Request, ResolvedModel
from inference_service.serving.service import GenerationService, ParsersOf
from inference_service.serving.telemetry.metrics import Metrics
from inference_service.serving.telemetry.model_series import ModelSeries
from inference_service.serving.telemetry.record import Watcher
from inference_service.serving.terms import ServingLimits, Terms
from inference_service.store import Batches
from inference_service.text.chat_template import ChatTemplate
from inference_service.text.text import Text
from loramux_shared.access.keys import ACCESS
from loramux_shared.bundle.generation import Generation
from loramux_shared.bundle.manifest import ScoreHead
from loramux_shared.bundle.npy import Array
from loramux_shared.faults import Fault, ReplicaFailed, fault_from

HERE: Final = Ticket("", FAIR, ())
"""The ticket of every request here: the engine's process has the limits."""


def served_to(service: GenerationService) -> dict[str, Any]:
    """Return what an API process must know of a service, as a message has it."""
    text, limits = service.text, service.limits
    return {
        "tokenizer": text.tokenizer_json(),
        "template": None if text.template is None else text.template.source,
        "vocab": text.vocab,
        "special": text.special_tokens,
        "gives_types": text.gives_types,
        "limits": [
            limits.max_seq_len,
            list(limits.eos_token_ids),
            limits.hidden_size,
            limits.encodes,
            limits.token_types,
        ],
        "max_queue": service.max_queue,
        "pooling": service.pooling_of_base,
        "logprobs_mode": service.logprobs_mode,
        "base": service.catalog.base_name,
        "deployed": deployed_to(service.catalog),
    }


def deployed_to(catalog: Catalog) -> list[Any]:
    """Return what a generation says about requests, as a message has it."""
    deployed = catalog.deployed
    return [
        deployed.number,
        deployed.served_model_name,
        deployed.request_default_max_tokens,
        deployed.tool_parser,
        deployed.reasoning_parser,
        deployed.pooling,
    ]


def _deployed_from(message: Seq[Any], before: Generation) -> Generation:
    number, name, max_tokens, tool, reasoning, pooling = message
    return before.model_copy(
        update={
            "number": number,
            "served_model_name": name,
            "request_default_max_tokens": max_tokens,
            "tool_parser": type(before.tool_parser)(tool),
            "reasoning_parser": type(before.reasoning_parser)(reasoning),
            "pooling": messages.pooling_from(pooling),
        }
    )


class RemoteEngine:
    """Gives requests to the engine's process, and hands outputs to the streams of their sequences."""

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self.channel: Channel
        self._numbers = itertools.count()
        self._open: dict[int, tuple[Outputs, Seq[Sequence], set[int]]] = {}
        """Requests, with the places of sequences that ended, which the engine's process has let go."""
        self._delivery = Delivery()
        self._stopped: Fault | None = None

    async def submit(self, seqs: Seq[Sequence], *order: Any) -> Outputs:
        """Put the sequences of a request in the engine's queue; the caller must close what it gets.

        Raises:
            Fault: what `EngineThread.submit` and the limits raise.
        """
        if self._stopped is not None:
            raise self._stopped.copy()
        number = next(self._numbers)
        places = {seq.id: place for place, seq in enumerate(seqs)}
        outputs = Outputs(seqs, lambda seq_id: self._close(number, places[seq_id]))
        self._open[number] = outputs, seqs, set()
        self._delivery.came = True
        try:
            await self.channel.ask("submit", number, *order)
        except BaseException:
            outputs.close()  # the engine may have begun
            raise
        return outputs

    def take(self, batch: Seq[tuple[int, int, Seq[Any]]]) -> None:
        """Hand the outputs of a step to their streams."""
        paced = len(self._open) > SLICE
        for number, place, items in batch:
            found = self._open.get(number)
            if found is None:
                continue
            stream, seqs, ended = found
            seq = seqs[place]
            outputs = [messages.output_from(item, seq) for item in items]
            stream.put(seq.id, outputs)
            if outputs[-1].finish is not None:
                ended.add(place)
            if paced:
                self._delivery.add(stream, urgent=outputs[0].first or outputs[-1].finish is not None)
            else:
                stream.wake()
        self._delivery.begin()

    def end(self, number: int, fault: Seq[Any]) -> None:
        """End one request with a fault."""
        if number in self._open:
            self._open[number][0].fail(fault_from(fault))

    def cut(self, fault: Fault) -> None:
        """End every request with a fault, and refuse new ones."""
        self._stopped = self._stopped or fault
        for outputs, *_ in list(self._open.values()):
            outputs.fail(fault.copy())

    def _close(self, number: int, place: int) -> None:
        outputs, _, ended = self._open[number]
        if place not in ended:
            self.channel.say("drop", number, place)
        if not outputs.open:
            del self._open[number]


class RemoteNaming(Naming):
    """Has the engine's process look names up, where they change."""

    def __init__(self, engine: RemoteEngine, catalog: Catalog, texts: AdapterTexts) -> None:
        super().__init__(catalog, None, texts)
        self._engine = engine

    async def choose(self, request: Request) -> ResolvedModel:
        """Return what answers a request.

        Raises:
            Fault: what `Naming.choose` raises.
        """
        reference = request.model
        if reference.served is not None:
            return reference.served
        rights = messages.access_to(ACCESS.get())
        order = messages.reference_to(reference), request.scheduling.deadline_s, rights
        model, generation = await self._engine.channel.ask("choose", *order)
        return ResolvedModel(messages.model_from(model, _handle), generation)


class RemoteReader:
    """Reads what adapters bring beside weights through the engine's process; called on threads of readers."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine = engine
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
        answer = self._engine.channel.ask(name, digest)
        return asyncio.run_coroutine_threadsafe(answer, self._loop).result()


class RemoteSeries(ModelSeries):
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


class RemoteMetrics(Metrics):
    """Counts as `Metrics` does, and hands over what it counted."""

    def __init__(self) -> None:
        self._models = self._taken = RemoteSeries()
        self._statuses: Counter[int] = Counter()

    def responded(self, status: int) -> None:
        """Count an answer of the HTTP server."""
        self._statuses[status] += 1

    def take(self) -> list[Any]:
        """Return what was counted since the last time."""
        statuses, self._statuses = dict(self._statuses), Counter()
        return [*self._taken.take(), statuses]


class RemoteService(GenerationService):
    """A service whose engine, names, limits and grammars are in the engine's process."""

    def __init__(
        self,
        served: Mapping[str, Any],
        parsers_of: ParsersOf,
        watchers: Seq[Watcher] = (),
        batches: Batches | None = None,
    ) -> None:
        """Begin with what `served_to` returns; the engine's channel is set before the first request."""
        source, special, vocab = served["template"], served["special"], served["vocab"]
        template = ChatTemplate(source, special) if source else None
        text = Text.from_json(served["tokenizer"], template, vocab, special, gives_types=served["gives_types"])
        max_seq_len, ends, hidden, encodes, types = served["limits"]
        self.remote = RemoteEngine(served["max_queue"])
        reader = cast(BundleReader, RemoteReader(self.remote))
        super().__init__(
            Catalog(1, served["base"], ()),
            text,
            cast(EngineThread, self.remote),  # other parts of the API answer what the engine's thread would
            ServingLimits(max_seq_len, frozenset(ends), hidden, encodes, types),
            texts=AdapterTexts(reader, text),
            pooling_of_base=messages.pooling_from(served["pooling"]),
            parsers_of=parsers_of,
            logprobs_mode=served["logprobs_mode"],
            batches=batches,
        )
        assert self.texts is not None  # noqa: S101 - given above
        self.naming = RemoteNaming(self.remote, self.catalog, self.texts)
        self.counted = RemoteMetrics()
        self.metrics = self.counted
        self._watchers = (self.metrics, *watchers)
        self.deploy(served["deployed"])

    def deploy(self, deployed: Seq[Any]) -> None:
        """Take over what a generation says about requests."""
        self.catalog.deployed = _deployed_from(deployed, self.catalog.deployed)

    def collect(self) -> list[Any]:
        """Return requests in work, and what was counted since the last time."""
        return [self.in_work, *self.counted.take()]

    def attach(self, channel: Channel) -> None:
        """Take outputs and generations from a channel, and give it all requests."""
        self.remote.channel = channel
        channel.handlers |= {"out": self.remote.take, "end": self.remote.end, "deployed": self.deploy}

    def end(self) -> None:
        """End all requests, since the engine's process is gone."""
        self.remote.cut(ReplicaFailed(GONE))

    def _admit(self, model: ServedModel) -> AbstractContextManager[Ticket]:  # noqa: ARG002 - not looked at here
        return nullcontext(HERE)

    async def _grammars(self, terms: Terms) -> Seq[Grammar | None]:
        output = terms.request.output
        far = [None if output.constraint is None else messages.FarGrammar() for _ in range(output.n)]
        return cast(Seq[Grammar | None], far)

    async def _submit(
        self,
        terms: Terms,
        model: ServedModel,
        seqs: Seq[Sequence],
        ticket: Ticket,  # noqa: ARG002 - the engine's process has one of its own
    ) -> Outputs:
        output, first = terms.request.output, seqs[0]
        constraint = output.constraint
        demanded = None
        if constraint is not None:
            demanded = [messages.constraint_to(constraint), list(terms.ends_of_text)]
        return await self.remote.submit(
            seqs,
            messages.model_to(model),
            messages.access_to(ACCESS.get()),
            messages.tokens_to(first.prompt),
            messages.sampling_to(first.sampling),
            len(seqs),
            demanded,
            first.pooling,
            first.second,
            first.priority,
            first.deadline_s,
            first.cache_salt,
        )


def _handle(digest: str, invocation: tuple[int, ...]) -> Adapter:
    return Adapter(digest, invocation=invocation)
