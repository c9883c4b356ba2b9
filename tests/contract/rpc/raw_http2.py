"""A client of raw HTTP/2: frames on a socket, enough for gRPC calls. Source: RFC 9113, RFC 7541."""

import asyncio
import struct

from loramux.inference.v1 import inference_pb2 as pb

GENERATE = b"/loramux.inference.v1.InferenceService/Generate"
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ASK_PING = b"\x00\x00\x08\x06\x00\x00\x00\x00\x00" + bytes(8)
CANCEL = struct.pack(">I", 8)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def hello(window: int = 65535) -> bytes:
    """Return a client's first bytes; window is the limit of unread bytes of each stream."""
    settings = frame(SETTINGS, 0, 0, struct.pack(">HI", 4, window))
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + frame(SETTINGS, 1, 0)


def call(stream: int, path: bytes = GENERATE) -> bytes:
    fields = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"x"}
    fields |= {b"te": b"trailers", b"content-type": b"application/grpc"}
    packed = [b"\0%c%s%c%s" % (len(name), name, len(value), value) for name, value in fields.items()]
    return frame(HEADERS, 4, stream, b"".join(packed))


def message(stream: int, request: pb.GenerateRequest) -> bytes:
    """The request of a call, and its end."""
    data = request.SerializeToString()
    return frame(DATA, 1, stream, b"\0" + struct.pack(">I", len(data)) + data)


async def connect(address: str, window: int = 65535) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(*address.rsplit(":", 1))
    writer.write(hello(window))
    return reader, writer


async def until_ended(reader: asyncio.StreamReader, stream: int) -> list[int]:
    """Read until the server ends a stream; return the kinds of the stream's frames."""
    kinds = []
    while True:
        head = await reader.readexactly(9)
        size, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
        await reader.readexactly(size)
        if int.from_bytes(head[5:], "big") == stream:
            kinds.append(kind)
            if kind == RESET or (flags & 1 and kind in (DATA, HEADERS)):
                return kinds
