"""Messages that calls write past their tasks, and how gRPC wakes the event loop."""

import asyncio
import socket
from types import MethodType

import pytest

from loramux_shared.rpc.calls import Writer
from loramux_shared.rpc.wakeups import take_wakeups_together


async def test_a_writer_writes_one_message_at_a_time() -> None:
    """A message that comes while another one is written follows it; an exception is the task's."""
    taken, sent, notes = asyncio.Event(), list[str](), list[bool]()

    async def write(message: str) -> None:
        await taken.wait()
        sent.append(message)
        if message == "last":
            raise ConnectionError

    writer = Writer(write, notes.append)
    assert (writer.has_room(), writer.when_room(taken.set)) == (False, False)  # the first message is the task's
    writer.begun = True
    writer.write("one")
    assert (writer.when_room(lambda: writer.write("last")), writer.has_room()) == (True, False)
    asyncio.get_running_loop().call_soon(taken.set)
    with pytest.raises(ConnectionError):
        await writer.until_written()
    with pytest.raises(ConnectionError):
        writer.write("more")
    assert (sent, notes) == (["one", "last"], [True, False] * 2)


def test_wakeups_are_taken_behind_their_events() -> None:
    """A turn of the loop takes all wake-ups, unless an exception may have left events."""
    (reads, writes), left = socket.socketpair(), list[int]()

    def handle(_: object) -> None:
        reads.recv(1)
        left.append(len(reads.recv(9, socket.MSG_PEEK)))
        if len(left) == 1:
            raise RuntimeError

    async def turns() -> None:
        take_wakeups_together()
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda *_: None)
        loop.add_reader(reads, MethodType(handle, type("Queue", (), {"__module__": "grpc"})()))
        writes.send(b"12345")
        for _ in range(3):
            await asyncio.sleep(0)

    with reads, writes:
        asyncio.run(turns())
    assert left == [4, 3]
