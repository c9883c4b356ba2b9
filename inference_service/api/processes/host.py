"""The engine's side of the channels to API processes: what they ask, and the outputs that they get."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence as Seq
from contextlib import ExitStack, suppress
from itertools import islice
from typing import Any, Final

import structlog
from structlog.contextvars import bound_contextvars

from inference_service.adapters.texts import AdapterTexts
from inference_service.api.http.app import Application
from inference_service.api.http.wire.refusals import REQUEST_ID
from inference_service.api.processes import messages
from inference_service.api.processes.channel import Channel
from inference_service.api.requests.service import GenerationService
from inference_service.core.request import Request, RequestPrompt, SchedulingOptions
from inference_service.core.sequence import Sequence, StepOutput
from inference_service.driver.delivery import Outputs
from inference_service.driver.engine_thread import Meter, SequenceView
from loramux_shared import routes
from loramux_shared.access.keys import ACCESS
from loramux_shared.faults import Fault, fault_to

COLLECT_S: Final = 1.0
"""For API processes to hand over their counts, before the sums are reported."""
MOST_PENDING: Final = 1 << 20
"""Outputs that wait for a process that does not read."""
TOGETHER: Final = 64
"""Answers of a message, so that what follows it does not wait for long."""
SUMMED: Final = (routes.METRICS.path, routes.LOAD.path)
"""Routes whose answers are sums over API processes."""

log = structlog.get_logger()


class RelayedOutputs(Outputs):
    """The outputs of one request of an API process; they leave with those of all others of the step."""

    paced = False

    def __init__(
        self,
        seqs: Seq[Sequence],
        on_close: Callable[[str], None],
        meter: Meter | None,
        peer: ApiPeer,
        number: int,
        leave: Callable[[], None],
    ) -> None:
        super().__init__({seq.id: SequenceView(seq) for seq in seqs}, on_close, meter)
        self.seqs = {seq.id: seq for seq in seqs}
        self._places = {seq.id: place for place, seq in enumerate(seqs)}
        self._peer = peer
        self._number = number
        self.leave = leave
        """Ends the request's place in the limits."""

    def _keep(self, seq_id: str, outputs: list[StepOutput]) -> None:
        """Send outputs of a sequence."""
        seq = self.seqs[seq_id]
        found = [messages.output_to(output, seq) for output in outputs]
        ends = outputs[-1].finish is not None
        self._peer.send((self._number, self._places[seq_id]), found, urgent=outputs[0].first or ends)
        if ends:
            self._peer.drop(self._number, self._places[seq_id])

    def wake(self) -> None:
        """Do nothing: what was put is on its way."""

    def fail(self, fault: Fault) -> None:
        """End with a fault what has not ended yet."""
        self._peer.send_now([(self._number, place) for place in self._places.values()])
        self._peer.channel.say("end", self._number, fault_to(fault))


class ApiPeer:
    """One API process, as the engine's process sees it."""

    def __init__(self, host: ApiHost, lost: Callable[[], None]) -> None:
        self._host = host
        self._service = host.service
        self._driver = host.service.local
        self._lost = lost
        self._open: dict[int, RelayedOutputs] = {}
        self._batch: dict[tuple[int, int], list[Any]] = {}
        """Outputs that were not sent yet, by request and place."""
        self._urgent: dict[tuple[int, int], list[Any]] = {}
        """The same of answers that begin or end, which go before the others."""
        self._pending = 0
        self._in_work = 0
        self.channel = Channel(
            {"drop": self.drop, "cut": host.service.local.engine.cut, "count": self._count},
            {
                "choose": self._choose,
                "texts": self._texts,
                "score": self._score,
                "submit": self._submit,
                "http": self._http,
            },
            self._on_lost,
            self._flush_where_read,
        )

    def send(self, answer: tuple[int, int], outputs: list[Any], *, urgent: bool = False) -> None:
        """Let outputs leave with the others of this turn of the event loop, in one message.

        While the process has much to read, they wait for more of the same answer: a process that is behind gets
        fewer and larger parts.
        """
        if not self._batch and not self._urgent:
            asyncio.get_running_loop().call_soon(self._flush_where_read)
        if urgent or answer in self._urgent:
            self._urgent.setdefault(answer, self._batch.pop(answer, [])).extend(outputs)
        else:
            self._batch.setdefault(answer, []).extend(outputs)
        self._pending += len(outputs)
        if self._pending > MOST_PENDING:
            log.error("API process does not read: its channel is closed", pending=self._pending)
            self.channel.close()

    async def collect(self) -> None:
        """Have what was counted since the last time added to the sums, at the latest when the answer comes."""
        await self.channel.ask("collect")

    def _flush_where_read(self) -> None:
        while self.channel.writable and (waiting := self._urgent or self._batch):
            self.send_now(list(islice(waiting, TOGETHER)))

    def send_now(self, answers: Iterable[tuple[int, int]]) -> None:
        """Send the outputs of answers that wait."""
        found = []
        for answer in answers:
            if outputs := self._urgent.pop(answer, None) or self._batch.pop(answer, None):
                found.append([*answer, outputs])
                self._pending -= len(outputs)
        self.channel.say("out", found)

    def _on_lost(self) -> None:
        """Free everything that the process had."""
        self._batch, self._urgent, self._pending = {}, {}, 0
        for number in list(self._open):
            self.drop(number)
        self._service.add_in_work(-self._in_work)
        self._host.peers.discard(self)
        self._lost()

    def drop(self, number: int, place: int | None = None) -> None:
        """Let one sequence of a request go, or all of them; one that ends is let go without a message."""
        outputs = self._open.get(number)
        if outputs is None:
            return
        for at, seq_id in enumerate(outputs.seqs):
            if place in (None, at):
                outputs.drop(seq_id)
        if not outputs.open:
            del self._open[number]
            outputs.leave()

    def _count(
        self,
        in_work: int,
        counts: Seq[tuple[str, str, str, int]],
        seconds: Seq[tuple[str, str, float]],
        statuses: Mapping[int, int],
    ) -> None:
        self._service.add_in_work(in_work - self._in_work)
        self._in_work = in_work
        self._driver.metrics.add(counts, seconds, statuses)

    async def _choose(self, reference: Seq[Any], deadline_s: float | None, access: Seq[Any]) -> list[Any]:
        ACCESS.set(messages.access_from(access))  # a task of its own
        scheduling = SchedulingOptions(deadline_s=deadline_s)
        request = Request(messages.reference_from(reference), RequestPrompt(""), scheduling=scheduling)
        served = await self._driver.choose(request)
        return [messages.model_to(served.model), served.generation]

    async def _texts(self, digest: str) -> Mapping[str, bytes]:
        return await self._texts_of_adapters.texts(digest)

    async def _score(self, digest: str) -> list[Any]:
        scorer = await self._texts_of_adapters.scorer(digest)
        return [scorer.head.model_dump_json(), scorer.weights.tobytes()]

    @property
    def _texts_of_adapters(self) -> AdapterTexts:
        assert self._driver.texts is not None  # noqa: S101 - every loaded replica has them
        return self._driver.texts

    async def _submit(self, number: int, access: Seq[Any], message: dict[str, Any]) -> None:
        """Give the engine the answers of a request; the process drops them one by one."""
        submission = messages.submission_from(message, self._driver.catalog.handle)
        ACCESS.set(messages.access_from(access))  # a task of its own

        made: list[RelayedOutputs] = []
        place = ExitStack()

        def make(seqs: Seq[Sequence], on_close: Callable[[str], None], meter: Meter | None) -> RelayedOutputs:
            made.append(RelayedOutputs(seqs, on_close, meter, self, number, place.close))
            return made[0]

        with ExitStack() as stack:
            stack.push(place)
            admission = place.enter_context(self._driver.admit(submission.model))
            await admission.submit(submission, make)
            self._open[number] = made[0]
            stack.pop_all()

    async def _http(
        self,
        scope: Mapping[str, Any],
        body: bytes,
        access: Seq[Any],
        request_id: str,
    ) -> list[Any]:
        """Answer a request whose route reads no prompt."""
        if scope["path"] in SUMMED:
            await self._host.collect()
        ACCESS.set(messages.access_from(access))
        with bound_contextvars(request_id=request_id):
            return await self._host.answer({**scope, "state": {REQUEST_ID: request_id}}, body)


class ApiHost:
    """The engine's process as API processes see it."""

    def __init__(self, service: GenerationService, *, keyless: bool) -> None:
        self.service = service
        self.peers: set[ApiPeer] = set()
        self.app = Application(service)
        self.app.state.keyless = keyless
        self.app.state.adapters = service.local.adapters

    async def collect(self) -> None:
        """Add up what all API processes counted; those that stand still are left out."""
        with suppress(TimeoutError):
            async with asyncio.timeout(COLLECT_S):
                await asyncio.gather(*(peer.collect() for peer in self.peers), return_exceptions=True)

    async def answer(self, scope: Mapping[str, Any], body: bytes) -> list[Any]:
        """Return status, headers and body of the answer to a request."""
        sent: list[Any] = []
        parts = bytearray()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                sent.extend((message["status"], list(message.get("headers", ()))))
            else:
                parts.extend(message.get("body", b""))

        whole = {"type": "http", "http_version": "1.1", "scheme": "http", "root_path": "", **scope}
        headers = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
        await self.app({**whole, "headers": headers}, receive, send)
        return [*sent, bytes(parts)]
