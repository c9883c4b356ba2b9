"""Sends requests and times them: a closed loop keeps so many open, an open loop sends them when they come."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from loramux.client import AsyncClient
from loramux.records import Delta, Finished, GenerateOptions, Started
from loramux_bench.figures import Outcome, percentile
from loramux_bench.workload import BenchRequest, Workload, arrivals
from loramux_shared.faults import Fault

MOST_CPU = 0.8
MOST_LAG_S = 0.02
SAMPLE_S = 0.02
PAUSE_S = 0.1
"""After a failure: a server that refuses at once would be asked without end."""


@dataclass(frozen=True)
class LoadPlan:
    """The load of a benchmark; a request that has begun is always waited for."""

    concurrency: int = 8
    """Open requests of a closed loop."""
    rate: float | None = None
    """Requests per second of an open loop; None: a closed one."""
    requests: int | None = None
    """Number of requests to send; None: no bound."""
    duration_s: float | None = None
    """None is sent later."""
    options: GenerateOptions = field(default_factory=lambda: GenerateOptions())


@dataclass(frozen=True)
class ClientLoad:
    """The load of the client's side: near its bounds, the figures are the client's and not the server's."""

    cpu: float
    """Seconds of a core per second."""
    lag_s: float | None
    """90th percentile of how late the event loop was."""

    @property
    def is_bottleneck(self) -> bool:
        """Return True if the client itself may have slowed the requests down."""
        return self.cpu > MOST_CPU or (self.lag_s or 0.0) > MOST_LAG_S


@dataclass
class BenchRun:
    """Outcomes as they come."""

    outcomes: list[Outcome] = field(default_factory=list)
    load: ClientLoad | None = None
    interrupted: bool = False
    """True if it was ended before its time; requests that were open then are left out."""


async def drive(
    client: AsyncClient, workload: Workload, plan: LoadPlan, tell: Callable[[Outcome], None] = lambda _: None
) -> BenchRun:
    """Send the requests of a plan and return what became of them; tell is called with each outcome."""
    run = BenchRun()
    begin = time.perf_counter()

    async def send(ask: BenchRequest, due: float) -> Outcome:
        outcome = await _send(client, ask, plan.options, begin, due)
        run.outcomes.append(outcome)
        tell(outcome)
        return outcome

    asks = itertools.islice(workload.asks(), plan.requests)
    async with _watched(run), asyncio.TaskGroup() as group:
        if plan.rate is None:
            for _ in range(plan.concurrency):
                group.create_task(_closed(send, asks, begin, plan.duration_s))
        else:
            for ask, due in zip(asks, arrivals(plan.rate, workload.seed), strict=False):
                if plan.duration_s is not None and due > plan.duration_s:
                    break
                await asyncio.sleep(max(0.0, begin + due - time.perf_counter()))
                group.create_task(send(ask, due))
    return run


async def _closed(
    send: Callable[[BenchRequest, float], Awaitable[Outcome]],
    asks: Iterator[BenchRequest],
    begin: float,
    duration_s: float | None,
) -> None:
    for ask in asks:
        now = time.perf_counter() - begin
        if duration_s is not None and now >= duration_s:
            return
        if (await send(ask, now)).error:
            await asyncio.sleep(PAUSE_S)


async def _send(
    client: AsyncClient, ask: BenchRequest, options: GenerateOptions, begin: float, due: float
) -> Outcome:
    first: float | None = None
    last = due
    tokens = first_tokens = prompt_tokens = cached = 0
    error = message = ""
    try:
        async for event in client.generate(ask.model, ask.prompt, **options):
            if isinstance(event, Delta):
                last = time.perf_counter() - begin
                tokens += len(event.token_ids)
                if first is None and event.token_ids:
                    first, first_tokens = last, tokens
            elif isinstance(event, Started):
                prompt_tokens = event.prompt_tokens
            elif isinstance(event, Finished):
                cached = event.usage.cached_tokens
    except Fault as fault:
        error, message = fault.reason, fault.message
    return Outcome(
        model=ask.model,
        begin=due,
        first=first,
        last=last,
        end=time.perf_counter() - begin,
        tokens=tokens,
        first_tokens=first_tokens,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached,
        error=error,
        message=message,
    )


@asynccontextmanager
async def _watched(run: BenchRun) -> AsyncIterator[None]:
    """Measure meanwhile how busy this process and its event loop are."""
    lags: list[float] = []
    sampler = asyncio.create_task(_sample(lags))
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        sampler.cancel()
        wall = time.perf_counter() - wall
        run.load = ClientLoad((time.process_time() - cpu) / wall, percentile(lags, 0.9))


async def _sample(lags: list[float]) -> None:
    while True:
        due = time.perf_counter() + SAMPLE_S
        await asyncio.sleep(SAMPLE_S)
        lags.append(time.perf_counter() - due)
