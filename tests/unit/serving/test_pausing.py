"""An engine that stands still: no request is lost, whatever the mode, and none overstays its deadline."""

from __future__ import annotations

import asyncio
import time

import pytest

from inference_service.core.sequence import EndReason
from inference_service.serving.engine_thread import EngineThread, PauseMode
from loramux_shared.faults import ReplicaPaused, ShuttingDown
from tests.support.waiting import ended, until
from tests.unit.serving.threads import Device, Threads, end, submit

HELD_AT = 3


async def _running(device: Device, thread: EngineThread) -> asyncio.Task[EndReason]:
    """A request in the middle of a step."""
    task = asyncio.create_task(end(submit(thread, new=30)))
    await until(lambda: device.steps == HELD_AT, "the step that is held", lambda: device.steps)
    return task


async def _passes(thread: EngineThread) -> None:
    """Wait until the engine's thread has passed its loop, so that a possible step has run."""
    loop = asyncio.get_running_loop()
    for _ in range(3):
        passed = asyncio.Event()
        thread._inbox.post(lambda: loop.call_soon_threadsafe(passed.set))  # noqa: B023 - awaited in its turn
        await ended(passed.wait(), "a pass of the engine's thread")


async def _asked_to_pause(thread: EngineThread, mode: PauseMode) -> asyncio.Task[None]:
    """A pause that was asked for, and has not come yet."""
    pause = asyncio.create_task(thread.pause(mode))
    await asyncio.sleep(0)
    assert thread.paused
    return pause


@pytest.mark.parametrize("depth", [0, 1])
async def test_what_is_kept_stands_still_and_goes_on(threads: Threads, depth: int) -> None:
    """No step runs after the pause returns, and old and new requests finish after the resume."""
    device = Device(HELD_AT, depth)
    thread = threads.start(device)
    task = await _running(device, thread)
    pause = await _asked_to_pause(thread, PauseMode.KEEP)
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
    assert await thread.stop() is None


async def test_what_is_under_way_is_ended_when_that_is_said(threads: Threads) -> None:
    """Requests under way end by name; a later one waits."""
    device = Device(HELD_AT)
    thread = threads.start(device)
    task = await _running(device, thread)
    pause = await _asked_to_pause(thread, PauseMode.ABORT)
    device.go.set()
    await pause
    with pytest.raises(ReplicaPaused):
        await task
    late = asyncio.create_task(end(submit(thread)))
    await _passes(thread)
    assert not late.done()
    thread.resume()
    assert await late is EndReason.LENGTH
    assert await thread.stop() is None


@pytest.mark.parametrize("called_off", [False, True])
async def test_what_is_under_way_may_end_first(threads: Threads, called_off: bool) -> None:
    """The pause returns after its end, or when it is cancelled; later requests have not begun, and continue
    afterwards."""
    device = Device(HELD_AT)
    thread = threads.start(device)
    task = await _running(device, thread)
    pause = await _asked_to_pause(thread, PauseMode.WAIT)
    late = asyncio.create_task(end(submit(thread)))
    if called_off:
        thread.resume()
        await pause
    device.go.set()
    await pause
    assert (task.done(), late.done()) == (not called_off, False)
    thread.resume()
    assert await asyncio.gather(task, late) == [EndReason.LENGTH] * 2
    assert await thread.stop() is None


@pytest.mark.parametrize("mode", [PauseMode.KEEP, PauseMode.WAIT])
async def test_deadlines_pass_while_nothing_moves(threads: Threads, mode: PauseMode) -> None:
    """Deadlines pass for requests that wait, in the engine's queue or before it."""
    device = Device(HELD_AT)
    thread = threads.start(device)
    task = await _running(device, thread)
    pause = await _asked_to_pause(thread, mode)
    if mode is PauseMode.KEEP:
        device.go.set()
    late = submit(thread, deadline_s=time.monotonic() + 0.03)
    assert await end(late) is EndReason.DEADLINE
    device.go.set()
    await pause
    thread.resume()
    assert await task is EndReason.LENGTH
    assert await thread.stop() is None


async def test_who_goes_away_while_nothing_moves_is_let_go(threads: Threads) -> None:
    """A client that disconnects during a pause frees its sequence before any step computes it."""
    device = Device(HELD_AT)
    thread = threads.start(device)
    await thread.pause()
    submit(thread).close()
    thread.resume()
    assert await end(submit(thread, new=1)) is EndReason.LENGTH
    assert device.steps == 1
    assert await thread.stop() is None


async def test_a_stop_ends_a_pause(threads: Threads) -> None:
    """A stop ends the pause for its caller, and the requests that wait for an answer get a fault."""
    device = Device(HELD_AT)
    thread = threads.start(device)
    task = await _running(device, thread)
    pause = await _asked_to_pause(thread, PauseMode.WAIT)
    stopped = asyncio.create_task(thread.stop())
    await asyncio.sleep(0)
    device.go.set()
    assert await stopped is None
    await ended(pause, "the pause")
    with pytest.raises(ShuttingDown):
        await task
