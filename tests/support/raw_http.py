"""A client of raw HTTP: bytes on a socket."""

from __future__ import annotations

import asyncio
import re

from tests.support.waiting import bounded

JSON = b"Host: localhost\r\nContent-Type: application/json\r\n"


class RawClient:
    """An HTTP connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, address: str) -> RawClient:
        return cls(*await asyncio.open_connection(*address.rsplit(":", 1)))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, bytes]:
        """Return the status and the body of one answer that says its length."""
        async with bounded("an answer"):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            return int(head.split()[1]), await self.reader.readexactly(int(length[1]) if length else 0)

    async def ended(self) -> bytes:
        """Wait until the server closes, and return the bytes before."""
        try:
            async with bounded("the end of the connection"):
                return await self.reader.read()
        except ConnectionError:
            return b""

    def close(self) -> None:
        self.writer.close()
