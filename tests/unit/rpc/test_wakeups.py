"""The wake-ups of the event loop by gRPC."""

from __future__ import annotations

import subprocess
import sys

SERVED = """
import asyncio, gc
from loramux_shared.rpc.server import RpcServer, Wakeups

async def main():
    server = RpcServer("127.0.0.1:0", {})
    await server.start()
    [wakeups] = [each for each in gc.get_objects() if isinstance(each, Wakeups)]
    callbacks = [key.fileobj for key in asyncio.get_running_loop()._selector.get_map().values()]
    print(wakeups in callbacks or wakeups.fileno() in callbacks)
    await server.drain(0)

asyncio.run(main())
"""


def test_one_read_takes_all_wakeups_of_grpc() -> None:
    """The event loop waits for gRPC at a socket whose bytes are all read at once."""
    # A process of its own: grpc.aio makes the socket once.
    ran = subprocess.run([sys.executable, "-c", SERVED], capture_output=True, text=True, check=True)
    assert ran.stdout == "True\n", ran.stderr
