"""Outputs on their way to the streams of requests; used on the event loop only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final, Generic, Protocol, TypeVar

from inference_service.core.sequence import StepOutput
from loramux_shared.faults import Fault

SLICE: Final = 32
"""Streams that are woken at once; as many as this are never made to wait for each other."""
TURNS: Final = 4
"""Turns of the loop in which a slice becomes messages: a stream over HTTP passes three tasks."""
LONGEST_REST_S: Final = 0.1
"""Longest rest, where something else blocked the loop in the middle of a slice."""
YIELDS: Final = 4
"""Factor by which they wait longer than usual at most for requests that come."""


S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Sink(Generic[T]):
    """A short cut to a client: what comes while the client has room is written at once, without a task."""

    has_room: Callable[[], bool]
    """True when everything that came before was written."""
    take: Callable[[T], None]
    """Writes; called only while there is room."""

    def mapped(self, make: Callable[[S], T]) -> Sink[S]:
        """Return a sink of what `make` makes the items of this one from."""
        return Sink(self.has_room, lambda item: self.take(make(item)))


class AnswerView(Protocol):
    """The engine's progress with one answer."""

    @property
    def num_cached(self) -> int:
        """Return the tokens of the prompt that the prefix cache held."""

    @property
    def began_s(self) -> float | None:
        """Return when the first step for it was submitted, on the clock of ``time.monotonic``."""

    @property
    def failure(self) -> str:
        """Return why its constraint could not be followed; empty while it could."""


class Outputs:
    """The outputs of the sequences of one request, as they come; one task reads them."""

    paced = True
    """Whether many streams wait for their turns."""

    def __init__(
        self,
        views: Mapping[str, AnswerView],
        on_close: Callable[[str], None],
        meter: Callable[[int], None] | None = None,
    ) -> None:
        """Wait for the outputs of sequences, whose ids are those of the views; on_close is called with each
        that is let go, and meter with the numbers of tokens that come.
        """
        self.views = views
        """The engine's progress with each answer, in the order of the answers."""
        self.submitted_s = time.monotonic()
        """When the engine was given the request."""
        self._meter = meter
        self._open = set(views)
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[str, list[StepOutput]] = {}
        """Outputs that wait, by the ids of their sequences."""
        self._awake = False
        """Whether `get` has something to return or to raise."""
        self._reader: asyncio.Future[None] | None = None
        self._failure: Exception | None = None
        self._sink: Callable[[Mapping[str, list[StepOutput]]], bool] | None = None

    def divert(self, sink: Callable[[Mapping[str, list[StepOutput]]], bool]) -> None:
        """Offer outputs to a sink while the reader waits for them; it takes them, or returns False for those
        that are left to the reader.
        """
        self._sink = sink

    def put(self, seq_id: str, outputs: list[StepOutput]) -> None:
        """Take outputs of a sequence, and count their tokens."""
        if self._meter is not None:
            self._meter(sum(output.token is not None for output in outputs))
        self._keep(seq_id, outputs)

    def _keep(self, seq_id: str, outputs: list[StepOutput]) -> None:
        """Keep outputs of a sequence until `wake`."""
        if seq_id in self._waiting:
            self._waiting[seq_id] += outputs
        else:
            self._waiting[seq_id] = outputs

    def wake(self) -> None:
        """Hand over what was put."""
        if not self._waiting:
            return
        if self._sink is not None and self._reader is not None and not self._reader.done():
            try:
                if self._sink(self._waiting):
                    self._waiting = {}
                    return
            except Exception as error:  # noqa: BLE001 - the reader raises it
                self._failure = self._failure or error
        self._wake()

    def _wake(self) -> None:
        self._awake = True
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> dict[str, list[StepOutput]]:
        """Wait for the next outputs, by sequence; a sequence has none behind the one with a finish reason.

        Raises:
            Fault: that of `fail`.
        """
        if not self._awake:
            self._reader = self._loop.create_future()  # an Event costs twice as much
            await self._reader
        if self._failure is not None:
            raise self._failure
        self._awake = False
        outputs, self._waiting = self._waiting, {}
        return outputs

    def fail(self, fault: Fault) -> None:
        """End with a fault what has not ended yet; the first one counts."""
        self._failure = self._failure or fault
        self._wake()

    @property
    def open(self) -> bool:
        """True while a sequence has not been dropped."""
        return bool(self._open)

    def drop(self, seq_id: str) -> None:
        """Let one sequence go; when it has not ended yet, it is freed at the next step."""
        if seq_id in self._open:
            self._open.remove(seq_id)
            self._on_close(seq_id)

    def close(self) -> None:
        """Let all sequences go."""
        for seq_id in tuple(self._open):
            self.drop(seq_id)


class Delivery:
    """Wakes streams in slices: those with first and last tokens in every turn, the others between rests.

    A stream that is woken costs the loop some 100 us, and gRPC takes one new call in two turns of the loop. So
    it rests as long as a slice took, and up to YIELDS times longer while requests come: whatever else there is
    has at least half of the loop, and what comes together at a stream meanwhile is one message. The interval
    follows the number of streams by itself. A first token comes once, and waits for no rest: where others keep
    turns of the loop long, rests would be seconds.
    """

    def __init__(self) -> None:
        self._urgent: dict[Outputs, None] = {}
        self._others: dict[Outputs, None] = {}
        self._hurrying = self._resting = False
        self.came = False
        """True if a request came since the last slice."""

    def add(self, stream: Outputs, *, urgent: bool) -> None:
        """Let a stream wait for its turn; `begin` follows."""
        if urgent:
            self._urgent[stream] = None
        elif stream not in self._urgent:
            self._others[stream] = None

    def begin(self) -> None:
        """Wake the first slices, unless some were woken a moment ago."""
        if self._urgent and not self._hurrying:
            self._hurrying = True
            _wake(self._urgent)
            asyncio.get_running_loop().call_soon(self._hurry)
        if self._others and not self._resting and not self._urgent:
            self._resting = True
            _wake(self._others)
            self._rest(asyncio.get_running_loop().time(), TURNS)

    def _hurry(self) -> None:
        self._hurrying = False
        self.begin()

    def _rest(self, began_s: float, turns: int) -> None:
        loop = asyncio.get_running_loop()
        if turns:
            loop.call_soon(self._rest, began_s, turns - 1)  # behind the tasks that were woken
            return
        took_s = min(loop.time() - began_s, LONGEST_REST_S)
        loop.call_later(took_s, self._go_on, took_s, YIELDS)

    def _go_on(self, took_s: float, yields: int) -> None:
        if self.came and yields:
            self.came = False
            asyncio.get_running_loop().call_later(took_s, self._go_on, took_s, yields - 1)
        else:
            self._resting = False
            self.begin()


def _wake(streams: dict[Outputs, None]) -> None:
    for stream in tuple(islice(streams, SLICE)):
        del streams[stream]
        stream.wake()
