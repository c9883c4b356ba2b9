"""Sends the requests of a plan: a closed loop keeps so many open, an open loop sends each when it is due."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext

from loramux_bench.records import ClientLoad, Record, Run, percentile
from loramux_bench.server import UNREACHED, Server
from loramux_bench.workload import CONCURRENCY, BenchRequest, Workload

MAX_CPU = 0.8
"""Seconds of a core per second; beyond, the client may be the bottleneck."""
MAX_LAG_MS = 20.0
MAX_LATE_S = 0.01
"""Seconds; later than this a start is a late one."""
MAX_LATE_STARTS = 0.01
SAMPLE_S = 0.02
PAUSE_S = 0.1
"""Pause of a stream after a failure: a server that refuses at once would be asked without end."""
MAX_UNREACHED = 10
"""Requests in a row that find or keep no server, after which the run ends."""


class Driver:
    """Fills a run with records; on_record is called with each."""

    def __init__(
        self, server: Server, workload: Workload, run: Run, on_record: Callable[[Record], None] = lambda _: None
    ) -> None:
        self._server, self._workload, self._plan, self._run = server, workload, workload.plan, run
        self._on_record = on_record
        self._unreached = 0

    async def drive(self, cpu_time: Callable[[], float] = time.process_time) -> None:
        """Send the requests, and wait for their answers."""
        self._now = asyncio.get_running_loop().time
        self._begin = self._now()
        requests = itertools.islice(self._workload.requests(), self._plan.num_prompts)
        async with self._watch_client(cpu_time), asyncio.TaskGroup() as group:
            if self._plan.request_rate is not None:
                await self._open_loop(group, requests)
            else:
                for _ in range(self._plan.max_concurrency or CONCURRENCY):
                    group.create_task(self._stream(requests))

    async def _open_loop(self, group: asyncio.TaskGroup, requests: Iterator[BenchRequest]) -> None:
        limit = self._plan.max_concurrency
        slots: AbstractAsyncContextManager[object] = asyncio.Semaphore(limit) if limit else nullcontext()
        for request, due_s in zip(requests, self._workload.arrivals(), strict=False):
            if not self._goes_on(due_s):
                return
            await asyncio.sleep(max(0.0, self._begin + due_s - self._now()))
            group.create_task(self._send(request, due_s, slots))

    async def _stream(self, requests: Iterator[BenchRequest]) -> None:
        while self._goes_on(due_s := self._now() - self._begin) and (request := next(requests, None)):
            if (await self._send(request, due_s, nullcontext())).error:
                await asyncio.sleep(PAUSE_S)

    def _goes_on(self, due_s: float) -> bool:
        if self._unreached >= MAX_UNREACHED:
            self._run.ended_by = f"the server is gone: {MAX_UNREACHED} requests in a row lost it"
        return not self._run.ended_by and (self._plan.duration_s is None or due_s < self._plan.duration_s)

    async def _send(
        self, request: BenchRequest, due_s: float, slots: AbstractAsyncContextManager[object]
    ) -> Record:
        record = Record(request.number, request.model, due_s, max(0.0, self._now() - self._begin - due_s))
        async with slots:
            await self._server.send(request, record, self._begin)
        self._unreached = self._unreached + 1 if record.error in UNREACHED else 0
        self._run.records.append(record)
        self._on_record(record)
        return record

    @asynccontextmanager
    async def _watch_client(self, cpu_time: Callable[[], float]) -> AsyncIterator[None]:
        """Measure meanwhile how busy this process and its event loop are."""
        lags_ms: list[float] = []
        sampler = asyncio.create_task(self._sample(lags_ms))
        cpu = cpu_time()
        try:
            yield
        finally:
            sampler.cancel()
            spent = (cpu_time() - cpu) / max(self._now() - self._begin, 1e-9)
            self._run.client = client_load(spent, percentile(lags_ms, 0.99) or 0.0, self._run.records)

    async def _sample(self, lags_ms: list[float]) -> None:
        while True:
            due = self._now() + SAMPLE_S
            await asyncio.sleep(SAMPLE_S)
            lags_ms.append(1e3 * max(0.0, self._now() - due))


def client_load(cpu: float, lag_ms: float, records: Sequence[Record]) -> ClientLoad:
    """Return the load of the client, with everything that speaks for the client as the bottleneck."""
    late = sum(each.late_s > MAX_LATE_S for each in records) / max(len(records), 1)
    limits = []
    if cpu >= MAX_CPU:
        limits.append(f"it took {cpu:.0%} of a core")
    if lag_ms > MAX_LAG_MS:
        limits.append(f"its event loop was {lag_ms:.0f} ms late (p99)")
    if late > MAX_LATE_STARTS:
        limits.append(f"{late:.0%} of the requests began more than {1e3 * MAX_LATE_S:.0f} ms late")
    return ClientLoad(cpu, lag_ms, late, tuple(limits))
