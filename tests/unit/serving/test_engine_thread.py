"""The engine's thread when steps fail: what goes away, what stays, and what never ends."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable

import pytest

from inference_service.core.batch import Batch
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import FinishReason, Sequence, Token
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.engine import Engine
from inference_service.engine.plan import SchedulerLimits
from inference_service.engine.residents import AlwaysResident
from inference_service.engine.step import Pending
from inference_service.serving.delivery import Outputs
from inference_service.serving.engine_thread import EngineThread
from loramux_shared.faults import QueueFull, ReplicaFailed

_ids = itertools.count()


class Device:
    """A runner whose steps do what a test says; every sampled sequence gets one token."""

    depth = 0

    def __init__(self) -> None:
        self.before_step: Callable[[Batch], object] = lambda _: None

    def submit(self, batch: Batch) -> Pending:
        """Run a step."""
        self.before_step(batch)
        seqs = tuple(chunk.seq for chunk in batch.chunks if chunk.samples)
        return Pending(seqs, lambda: [Token(7)] * len(seqs))


def _thread(device: Device, step_timeout_s: float = 60.0) -> EngineThread:
    limits = SchedulerLimits(max_tokens=64, max_seqs=8, max_adapters=1, max_seq_len=64)
    engine = Engine(device, limits, BlockManager(64, 4), AlwaysResident())

    def probe() -> None:
        engine.add(Sequence("probe", [0], SamplingParams(max_tokens=1)))
        while not engine.idle:
            engine.step()

    return EngineThread(engine, 8, probe, step_timeout_s=step_timeout_s)


def _submit(thread: EngineThread, prompt: int = 3, new: int = 2) -> Outputs:
    return thread.submit([Sequence(f"{next(_ids)}", [5] * prompt, SamplingParams(max_tokens=new))])


async def _end(outputs: Outputs) -> FinishReason:
    async with asyncio.timeout(30):
        while True:
            for output in await outputs.get():
                if output.finish is not None:
                    outputs.close()
                    return output.finish


def _raise_at(length: int) -> Callable[[Batch], object]:
    def raise_at(batch: Batch) -> None:
        if batch.num_tokens == length:
            raise ValueError("a bad step")

    return raise_at


async def test_a_bad_step_ends_its_sequences_and_nothing_else() -> None:
    """A request that no step can compute may come as often as it likes: others are served after each."""
    device = Device()
    device.before_step = _raise_at(13)
    thread = _thread(device)
    thread.start()
    for _ in range(5):
        assert await _end(_submit(thread, prompt=13)) is FinishReason.FAILED
    assert await _end(_submit(thread)) is FinishReason.LENGTH
    assert await thread.stop() is None


async def test_what_others_held_for_a_moment_is_waited_for() -> None:
    """A probe that fails once and then works, as when memory came back, leaves the replica serving."""
    device = Device()
    failures = iter([True, True])

    def out_of_memory(batch: Batch) -> None:
        if next(failures, False):
            raise MemoryError

    device.before_step = out_of_memory
    thread = _thread(device)
    thread.start()
    assert await _end(_submit(thread)) is FinishReason.FAILED
    assert await _end(_submit(thread)) is FinishReason.LENGTH
    assert await thread.stop() is None


def _gone(batch: Batch) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("requests", [1, 3])
async def test_an_error_that_stays_ends_health_first_and_then_every_request(requests: int) -> None:
    """Those under way, those that wait and those that come are all told REPLICA_FAILED."""
    device = Device()
    device.before_step = _gone
    thread = _thread(device)
    order: list[str] = []

    async def on_failure() -> None:
        order.append("asked for")
        await asyncio.sleep(0.01)
        order.append("not serving")

    async def ask() -> None:
        with pytest.raises(ReplicaFailed, match=r"RuntimeError.*another replica"):
            await _end(_submit(thread))
        order.append("told")

    thread.start(on_failure)
    await asyncio.gather(*(ask() for _ in range(requests)))
    assert order == ["asked for", "not serving", *["told"] * requests]
    with pytest.raises(ReplicaFailed):
        _submit(thread)
    why = await thread.ended()
    assert why is not None
    assert "RuntimeError" in why
    assert await thread.stop() == why


async def test_a_step_that_never_ends_is_seen_from_outside() -> None:
    """The requests end with the name of the setting, though the thread that runs steps is stuck."""
    device, free = Device(), threading.Event()
    device.before_step = lambda _: free.wait(20)
    thread = _thread(device, step_timeout_s=0.1)
    thread.start()
    with pytest.raises(ReplicaFailed, match=r"LORAMUX_STEP_TIMEOUT_S=0\.1"):
        await _end(_submit(thread))
    assert await thread.ended() is not None
    free.set()


async def test_steps_in_time_never_wake_the_watchdog() -> None:
    """The bound is for one step, not for all of them together, nor for the time between two."""
    device = Device()
    device.before_step = lambda _: time.sleep(0.015)
    thread = _thread(device, step_timeout_s=0.5)
    thread.start()
    assert await _end(_submit(thread, new=40)) is FinishReason.LENGTH
    await asyncio.sleep(0.6)
    assert await _end(_submit(thread)) is FinishReason.LENGTH
    assert await thread.stop() is None


async def test_a_mistake_outside_a_step_ends_every_request_too() -> None:
    """The thread cannot vanish behind the back of those who wait for it."""
    device = Device()
    thread = _thread(device)
    thread.start()
    broken = Sequence("broken", [5], SamplingParams(max_tokens=1))
    broken.priority = None  # type: ignore[assignment]  # what no door lets through: the queue cannot be sorted
    outputs = thread.submit([broken])
    with pytest.raises(ReplicaFailed):
        await _end(outputs)
    assert await thread.ended() == "its thread failed"


def _seats(max_seqs: int, max_queue: int, device: Device) -> EngineThread:
    limits = SchedulerLimits(max_tokens=512, max_seqs=max_seqs, max_adapters=1, max_seq_len=64)
    engine = Engine(device, limits, BlockManager(1024, 4), AlwaysResident())
    return EngineThread(engine, max_queue, lambda: None, step_timeout_s=60)


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.002)


async def test_those_who_will_find_a_seat_do_not_wait() -> None:
    """An idle replica takes as many at once as it has seats and places to wait, and refuses the next one."""
    thread = _seats(64, 32, Device())
    outputs = [_submit(thread) for _ in range(64 + 32)]
    with pytest.raises(QueueFull):
        _submit(thread)
    thread.start()
    assert {await _end(each) for each in outputs} == {FinishReason.LENGTH}
    assert await _end(_submit(thread)) is FinishReason.LENGTH
    assert await thread.stop() is None


async def test_a_full_queue_refuses_at_once_and_one_that_ends_makes_room() -> None:
    """With all seats taken, as many wait as the queue holds, whether or not a step has seen them."""
    device, go = Device(), threading.Event()
    steps = itertools.count()
    device.before_step = lambda _: next(steps) == 0 or go.wait(20)
    thread = _seats(2, 3, device)
    running = [_submit(thread, new=30) for _ in range(2)]
    thread.start()
    await _until(lambda: thread.stats.running == 2)
    waiting = [_submit(thread) for _ in range(3)]
    for _ in range(2):
        with pytest.raises(QueueFull):
            _submit(thread)
    waiting.pop().close()
    waiting.append(_submit(thread))
    with pytest.raises(QueueFull):
        _submit(thread)
    go.set()
    assert {await _end(each) for each in (*running, *waiting)} == {FinishReason.LENGTH}
    assert await thread.stop() is None


async def test_free_seats_that_a_step_cannot_fill_let_nobody_in() -> None:
    """Where blocks run out before seats, those that a step left waiting fill the queue."""
    limits = SchedulerLimits(max_tokens=64, max_seqs=8, max_adapters=1, max_seq_len=64, watermark=0.0)
    device, go = Device(), threading.Event()
    device.before_step = lambda _: go.wait(20)
    engine = Engine(device, limits, BlockManager(8, 4), AlwaysResident())
    thread = EngineThread(engine, 2, lambda: None, step_timeout_s=60)
    taken = [_submit(thread, prompt=20) for _ in range(3)]
    thread.start()
    await _until(lambda: thread.stats.left == 2)
    assert thread.stats.seats - thread.stats.running == 7
    with pytest.raises(QueueFull):
        _submit(thread)
    go.set()
    assert {await _end(each) for each in taken} == {FinishReason.LENGTH}
    assert await thread.stop() is None
