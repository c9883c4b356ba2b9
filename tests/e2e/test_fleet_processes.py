"""A client's fleet of real processes under traffic, one of which gets a signal."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from loramux import AsyncClient, Delta, faults

REPLICA = "from tests.support.fake_services import main; main('inference')"
REQUESTS = 530
WORKERS = 24


def start(address: str) -> subprocess.Popen[bytes]:
    """A replica of scripted answers."""
    return subprocess.Popen([sys.executable, "-c", REPLICA, "--grpc", address], stderr=subprocess.DEVNULL)


@pytest.fixture
def processes() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Three of them, by their addresses."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    started = {address: start(address) for address in addresses}
    try:
        yield started
    finally:
        for process in started.values():
            process.kill()
            process.wait()


async def answered(client: AsyncClient, number: int) -> str:
    """How a request ended; one in ten takes a second."""
    tokens = 0
    try:
        async for event in client.generate(f"lora{number % 2 + 1}", "slow" if number % 10 == 0 else "hi"):
            tokens += isinstance(event, Delta)
    except faults.ServerUnavailable as fault:
        if not fault.retry_after_s:
            return "untold"
        return "cut" if tokens else "lost"
    return "whole"


@pytest.mark.sweep
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_signal_under_traffic(
    processes: dict[str, subprocess.Popen[bytes]], number: signal.Signals
) -> None:
    """SIGTERM costs nobody anything; SIGKILL those alone that had tokens, who are told when to try again."""
    requests = iter(range(REQUESTS))
    async with AsyncClient(list(processes)) as client:
        async with asyncio.timeout(60):
            for address in processes:
                async with AsyncClient(address) as one:
                    while True:
                        try:
                            await one.models()
                            break
                        except faults.ServerUnavailable:
                            await asyncio.sleep(0.1)

        async def work() -> list[str]:
            return [await answered(client, each) for each in requests]

        workers = [asyncio.create_task(work()) for _ in range(WORKERS)]
        await asyncio.sleep(0.3)
        address, process = next(iter(processes.items()))
        process.send_signal(number)
        await asyncio.to_thread(process.wait, 30)
        processes[address] = start(address)
        ends = [end for found in await asyncio.gather(*workers) for end in found]
    assert len(ends) == REQUESTS
    assert set(ends) <= ({"whole", "cut"} if number is signal.SIGKILL else {"whole"})
