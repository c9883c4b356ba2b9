"""The engine's thread: requests end when steps fail, and none is lost while the engine stands still."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, EndReason, Sequence
from inference_service.driver import engine_thread
from inference_service.driver.engine_thread import (
    LOOK_S,
    PROBE_PAUSES_S,
    Command,
    EngineThread,
    Inbox,
    PauseMode,
)
from inference_service.driver.watchdog import Watchdog
from loramux_shared.faults import QueueFull, ReplicaFailed, ReplicaPaused, ShuttingDown
from tests.support.waiting import result_of, until
from tests.unit.serving.threads import Device, Threads, end, submit


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before probes, which take no time."""
    paused: list[float] = []
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=paused.append)
    monkeypatch.setattr(engine_thread, "time", clock)
    return paused


class CountingInbox(Inbox):
    """Counts what is posted."""

    posted = 0

    def post(self, command: Command) -> None:
        self.posted += 1
        super().post(command)


async def test_what_others_held_for_a_moment_is_waited_for(threads: Threads, pauses: list[float]) -> None:
    """A probe that fails once and then works, as when memory came back, leaves the replica serving."""
    device, inbox = Device(), CountingInbox()
    failures = iter([True, True])

    def out_of_memory(batch: Batch) -> None:
        if next(failures, False):
            raise MemoryError

    device.before_step = out_of_memory
    thread = threads.start(device, inbox=inbox)
    assert await end(submit(thread)) is EndReason.FAILED
    assert await end(submit(thread)) is EndReason.LENGTH
    assert pauses == list(PROBE_PAUSES_S)
    assert device.prompts == [3, 1, 1, 3]  # a probe that failed leaves nothing
    before = inbox.posted
    assert await end(submit(thread)) is EndReason.LENGTH
    assert inbox.posted == before + 1  # what ended by itself is not aborted too


async def test_a_request_that_a_step_raises_for_ends_alone(threads: Threads, pauses: list[float]) -> None:
    """The one of five requests that a step raises for fails; the others get all of their tokens."""
    device = Device()

    def out_of_range(batch: Batch) -> None:
        if any(chunk.seq.num_prompt == 9 for chunk in batch.chunks):
            raise IndexError

    device.before_step = out_of_range
    thread = threads.make(device)
    requests = [submit(thread, prompt, new=5) for prompt in (3, 4, 9, 5, 6)]
    thread.start()
    ends = await asyncio.gather(*(end(each) for each in requests))
    assert ends == [EndReason.LENGTH] * 2 + [EndReason.FAILED] + [EndReason.LENGTH] * 2
    assert await end(submit(thread)) is EndReason.LENGTH


def _gone(batch: Batch) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


async def test_an_error_that_stays_ends_health_first_and_then_every_request(threads, pauses) -> None:
    """Requests that run, that wait and that come later all end with REPLICA_FAILED."""
    device = Device()
    device.before_step = _gone
    thread = threads.make(device)
    order: list[str] = []

    async def on_failure() -> None:
        order.append("asked for")
        for _ in range(9):  # turns of the loop, in which a request could end
            await asyncio.sleep(0)
        order.append("not serving")

    async def ask() -> None:
        with pytest.raises(ReplicaFailed, match=r"RuntimeError.*another replica"):
            await end(submit(thread))
        order.append("told")

    thread.start(on_failure)
    await asyncio.gather(*(ask() for _ in range(3)))
    assert order == ["asked for", "not serving", *["told"] * 3]
    assert pauses == list(PROBE_PAUSES_S)
    with pytest.raises(ReplicaFailed):
        submit(thread)
    threads.why = await thread.ended()
    assert "RuntimeError" in threads.why


def test_a_watchdog_bounds_each_step_by_itself() -> None:
    """The bound is for one step, not for all of them together, nor for the time between two."""
    now_s, late = [0.0], list[float]()
    watchdog = Watchdog(10.0, lambda: late.append(now_s[0]), clock=lambda: now_s[0])
    for _ in range(3):
        with watchdog:
            now_s[0] += 10.0
            assert not watchdog.look()
        now_s[0] += 100.0
        assert not watchdog.look()
    assert late == []
    with watchdog:
        now_s[0] += 10.5
        assert watchdog.look()
    assert late == [340.5]


async def test_a_mistake_outside_a_step_ends_every_request_too(threads: Threads) -> None:
    """An error of the engine outside a step fails every request and ends the thread."""
    thread = threads.start(Device())
    priority: Any = None  # no API lets it through: the queue cannot be sorted
    broken = Sequence("broken", [5], SamplingParams(max_tokens=1), priority=priority)
    outputs = thread.submit([broken])
    with pytest.raises(ReplicaFailed):
        await end(outputs)
    threads.why = await thread.ended()
    assert threads.why == "its thread failed"


async def test_free_seats_that_a_step_cannot_fill_let_nobody_in(threads: Threads) -> None:
    """Requests that a step left waiting fill the queue, where blocks run out before seats."""
    device = Device(held_from=1)
    thread = threads.make(device, max_queue=2, blocks=8)
    taken = [submit(thread, prompt=20) for _ in range(3)]
    thread.start()
    await until(lambda: thread.stats.left == 2, "two that a step left", lambda: thread.stats)
    assert thread.stats.seats - thread.stats.running == 7
    with pytest.raises(QueueFull):
        submit(thread)
    device.go.set()
    assert {await end(each) for each in taken} == {EndReason.LENGTH}


async def test_one_key_does_not_fill_the_queue(threads: Threads) -> None:
    """A key that is alone has all places but one, beside the seats that it finds; the next key has the last."""
    device = Device(held_from=1)
    thread = threads.make(device, max_queue=8, seqs=2)
    taken = [submit(thread, key_id="a") for _ in range(2 + 7)]
    refusal = "requests of the API key 'a' have its share of the 8 that may wait"
    with pytest.raises(QueueFull, match=refusal):
        submit(thread, key_id="a")
    thread.start()
    await until(lambda: device.steps == 1, "a step of two", lambda: thread.stats)
    assert thread.stats.left == 7
    with pytest.raises(QueueFull, match=refusal):
        submit(thread, key_id="a")
    taken.append(submit(thread, key_id="b"))
    for key_id in ("b", "c", ""):
        with pytest.raises(QueueFull, match="8 requests wait already"):
            submit(thread, key_id=key_id)
    device.go.set()
    assert {await end(each) for each in taken} == {EndReason.LENGTH}


async def test_busy_keys_have_equal_parts_of_the_queue(threads: Threads) -> None:
    """Each of two keys comes to half, and calls without a key have what is left."""
    device = Device(held_from=1)
    thread = threads.make(device, max_queue=8, seqs=2)
    taken = [submit(thread, key_id="a") for _ in range(2)]
    thread.start()
    await until(lambda: device.steps == 1, "a step of two", lambda: thread.stats)
    taken += [submit(thread, key_id=key_id) for key_id in "ababaa"]
    with pytest.raises(QueueFull, match="'a' have its share"):
        submit(thread, key_id="a")
    with pytest.raises(QueueFull, match="'b' have its share"):
        submit(thread, key_id="b", n=2)
    taken += [submit(thread, key_id="") for _ in range(2)]
    with pytest.raises(QueueFull, match="8 requests wait already"):
        submit(thread)
    device.go.set()
    assert {await end(each) for each in taken} == {EndReason.LENGTH}


async def test_parts_are_equal_in_a_short_queue_too(threads: Threads) -> None:
    """A key has no more than its part where most places are free, unless no request waits."""
    device = Device(held_from=1)
    thread = threads.make(device, max_queue=16, seqs=8)
    taken = [submit(thread, key_id="a") for _ in range(5)]
    taken += [submit(thread, key_id=key_id) for key_id in "bcd"]
    thread.start()
    await until(lambda: device.steps == 1, "a step of eight", lambda: thread.stats)
    taken += [submit(thread, key_id=key_id) for key_id in "bcdaaaa"]
    with pytest.raises(QueueFull, match="'a' have its share"):
        submit(thread, key_id="a")
    taken.append(submit(thread, key_id="b"))
    device.go.set()
    assert {await end(each) for each in taken} == {EndReason.LENGTH}


HELD_AT = 3


async def _running(device: Device, thread: EngineThread) -> asyncio.Task[EndReason]:
    """A request in the middle of a step."""
    task = asyncio.create_task(end(submit(thread, new=30)))
    await until(lambda: device.steps == HELD_AT, "the step that is held", lambda: device.steps)
    return task


async def _passes(thread: EngineThread) -> None:
    """Wait until the engine's thread has passed its loop, so that a possible step has run."""
    for _ in range(3):
        await result_of(thread.inspect(), "a pass of the engine's thread")


async def _pausing(threads: Threads, mode: PauseMode, depth: int = 0) -> Any:
    """Return a device in the middle of a step, its thread, the request, and a pause that has not come yet."""
    device = Device(HELD_AT, depth)
    thread = threads.start(device)
    task = await _running(device, thread)
    pause = asyncio.create_task(thread.pause(mode))
    await asyncio.sleep(0)
    assert thread.paused
    return device, thread, task, pause


@pytest.mark.parametrize("depth", [0, 1])
async def test_what_is_kept_stands_still_and_goes_on(threads: Threads, depth: int) -> None:
    """No step runs after the pause returns, and old and new requests finish after the resume."""
    device, thread, task, pause = await _pausing(threads, PauseMode.KEEP, depth)
    device.go.set()
    await pause
    steps = device.steps
    late = asyncio.create_task(end(submit(thread)))
    await _passes(thread)
    assert thread.paused
    assert (device.steps, task.done(), late.done()) == (steps, False, False)
    await thread.pause(PauseMode.KEEP)  # again: nothing changes
    thread.resume()
    assert await asyncio.gather(task, late) == [EndReason.LENGTH] * 2


async def test_what_is_under_way_is_ended_on_request(threads: Threads) -> None:
    """A pause that aborts ends running requests; later ones wait for the resumption."""
    device, thread, task, pause = await _pausing(threads, PauseMode.ABORT)
    device.go.set()
    await pause
    with pytest.raises(ReplicaPaused):
        await task
    late = asyncio.create_task(end(submit(thread)))
    await _passes(thread)
    assert not late.done()
    thread.resume()
    assert await late is EndReason.LENGTH


@pytest.mark.parametrize("called_off", [False, True])
async def test_what_is_under_way_may_end_first(threads: Threads, called_off: bool) -> None:
    """The pause returns after the running requests, or when cancelled; later ones continue afterwards."""
    device, thread, task, pause = await _pausing(threads, PauseMode.WAIT)
    late = asyncio.create_task(end(submit(thread, n=2)))
    if called_off:
        thread.resume()
        await pause
    device.go.set()
    await pause
    assert (task.done(), late.done()) == (not called_off, False)
    thread.resume()
    assert await asyncio.gather(task, late) == [EndReason.LENGTH] * 2


async def test_what_leaves_while_others_end_is_neither_waited_for_nor_begun(threads: Threads) -> None:
    """A request that came during the pause and left does not end it, and the engine never has it."""
    device, thread, task, pause = await _pausing(threads, PauseMode.WAIT)
    for _ in range(2):
        late = submit(thread)
        await asyncio.sleep(2 * LOOK_S)
        assert not pause.done()
        late.close()
    thread.resume()
    device.go.set()
    assert await task is EndReason.LENGTH
    await _passes(thread)
    assert len(device.prompts) == 1


@pytest.mark.parametrize("mode", [PauseMode.KEEP, PauseMode.WAIT])
async def test_deadlines_pass_while_nothing_moves(threads: Threads, mode: PauseMode) -> None:
    """Deadlines pass for requests that wait, in the engine's queue or before it."""
    device, thread, task, pause = await _pausing(threads, mode)
    if mode is PauseMode.KEEP:
        device.go.set()
    late = submit(thread, deadline_s=time.monotonic() + 0.03)
    assert await end(late) is EndReason.DEADLINE
    device.go.set()
    await pause
    thread.resume()
    assert await task is EndReason.LENGTH


async def test_a_stop_ends_a_pause(threads: Threads) -> None:
    """A stop during a pause ends the pause and its requests."""
    device, thread, task, pause = await _pausing(threads, PauseMode.WAIT)
    stopped = asyncio.create_task(thread.stop())
    await asyncio.sleep(0)
    device.go.set()
    assert await stopped is None
    await result_of(pause, "the pause")
    with pytest.raises(ShuttingDown):
        await task


async def test_an_inspection_shows_the_engine_between_two_steps(threads: Threads) -> None:
    """An inspection waits for the step that is running, and is None once the thread has ended."""
    device = Device(HELD_AT)
    thread = threads.start(device)
    task = await _running(device, thread)
    inspection = asyncio.ensure_future(thread.inspect())
    await asyncio.sleep(0)
    assert not inspection.done()
    device.go.set()
    found = await result_of(inspection, "an inspection")
    assert found is not None
    assert len(found.running) == found.stats.running == 1
    assert (found.waiting, found.aside, found.resident, found.states) == ((), (), (), None)
    [use] = found.blocks
    assert len(use.held) + len(use.cached) + len(use.free) == found.stats.blocks_total
    assert use.held.keys().isdisjoint(use.cached | use.free)
    assert await task is EndReason.LENGTH
    left = await result_of(thread.inspect(), "an inspection")
    assert left is not None
    assert (left.running, left.steps, left.blocks[0].held, left.served) == ((), 0, {}, {})
    await thread.stop()
    assert await result_of(thread.inspect(), "the end") is None
