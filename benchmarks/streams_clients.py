"""Streams of many clients over raw sockets, as cheap as Python has them: answers are counted, not parsed.

``python -m benchmarks.streams_clients API ADDRESS STREAMS TOKENS`` begins so many streams at once, chats over
``http`` with a connection each or calls over one connection of ``grpc``, and begins again when all have ended.
Each round prints the seconds to the first tokens, then those to the ends.
"""

import json
import selectors
import socket
import sys
import time
from collections.abc import Iterator
from typing import Final

from loramux.inference.v1 import inference_pb2 as pb
from loramux_shared.process import raise_limit

MODEL: Final = "base"
METHOD: Final = b"/loramux.inference.v1.InferenceService/Generate"
DATA, HEADERS, SETTINGS, PING, WINDOW = 0, 1, 4, 6, 8
"""Kinds of HTTP/2 frames."""
END, WHOLE, ACK = 1, 4, 1
"""Flags of frames: the stream's last one, headers in one piece, an acknowledgement."""
WIDEST: Final = 2**31 - 1
"""Bytes that a server may send before it hears of the client."""
Sign = tuple[int, bool]
"""The number of a stream, and whether it has ended; else more of it came."""


class HttpStream:
    """A chat on a connection of its own."""

    def __init__(self, sock: socket.socket, number: int, tokens: int) -> None:
        self._number, self._tail = number, b""
        messages = [{"role": "user", "content": "w5 w6 w7 w8"}]
        body = {"model": MODEL, "messages": messages, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        data = json.dumps(body).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        sock.sendall(b"%scontent-length: %d\r\n\r\n%s" % (head, len(data), data))

    def read(self, _sock: socket.socket, received: bytes) -> Iterator[Sign]:
        """Yield what happened to the stream."""
        self._tail = (self._tail + received)[-5:]
        ended = self._tail == b"0\r\n\r\n"
        if ended or b"data: " in received:
            yield self._number, ended


class GrpcStreams:
    """Calls on one connection, in as much of HTTP/2 as that takes."""

    def __init__(self, sock: socket.socket, streams: int, tokens: int) -> None:
        self._buffer, self._taken = bytearray(), 0
        sampling = pb.SamplingParams(max_tokens=tokens, ignore_eos=True)
        call = pb.GenerateRequest(model=MODEL, token_ids=pb.TokenIds(ids=[5, 6, 7, 8]), sampling=sampling)
        message = call.SerializeToString()
        names = {
            b":path": METHOD,
            b":authority": b"x",
            b"te": b"trailers",
            b"content-type": b"application/grpc",
        }
        head = b"\x83\x86" + b"".join(
            b"\0%c%b%c%b" % (len(name), name, len(value), value) for name, value in names.items()
        )
        settings = b"\0\4" + WIDEST.to_bytes(4)
        sock.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(SETTINGS, 0, 0, settings) + _window(WIDEST - 65535)
        )
        for number in range(streams):
            data = b"\0" + len(message).to_bytes(4) + message
            sock.sendall(_frame(HEADERS, WHOLE, 2 * number + 1, head) + _frame(DATA, END, 2 * number + 1, data))

    def read(self, sock: socket.socket, received: bytes) -> Iterator[Sign]:
        """Yield what happened to streams, and keep the connection alive."""
        buffer, at = self._buffer, 0
        buffer += received
        self._taken += len(received)
        if self._taken > WIDEST // 2:
            sock.sendall(_window(self._taken))
            self._taken = 0
        while len(buffer) >= at + 9 and len(buffer) >= (end := at + 9 + int.from_bytes(buffer[at : at + 3])):
            kind, flags, number = buffer[at + 3], buffer[at + 4], int.from_bytes(buffer[at + 5 : at + 9]) // 2
            if kind == DATA:
                yield number, False
            elif kind == HEADERS and flags & END:
                yield number, True
            elif kind in (PING, SETTINGS) and not flags & ACK:
                sock.sendall(_frame(kind, ACK, 0, bytes(buffer[at + 9 : end]) if kind == PING else b""))
            at = end
        del buffer[:at]


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return b"%b%c%c%b%b" % (len(payload).to_bytes(3), kind, flags, stream.to_bytes(4), payload)


def _window(more: int) -> bytes:
    return _frame(WINDOW, 0, 0, more.to_bytes(4))


def one_round(api: str, address: str, streams: int, tokens: int) -> Iterator[list[float]]:
    """Begin so many streams at once; yield the seconds to their first tokens, then those to their ends."""
    host, _, port = address.rpartition(":")
    count = streams if api == "http" else 1
    socks = [socket.create_connection((host, int(port))) for _ in range(count)]
    firsts, ends, began_s = dict[int, float](), dict[int, float](), time.perf_counter()
    with selectors.DefaultSelector() as selector:
        for number, sock in enumerate(socks):
            if api == "http":
                selector.register(sock, selectors.EVENT_READ, (sock, HttpStream(sock, number, tokens)))
            else:
                selector.register(sock, selectors.EVENT_READ, (sock, GrpcStreams(sock, streams, tokens)))
        while len(ends) < streams:
            for key, _ in selector.select():
                sock, made = key.data
                if not (received := sock.recv(1 << 18)):
                    raise ConnectionError(
                        f"the server closed a connection with {len(ends)} streams of {streams} ended"
                    )
                for number, ended in made.read(sock, received):
                    if number not in firsts:
                        firsts[number] = time.perf_counter() - began_s
                        if len(firsts) == streams:
                            yield list(firsts.values())
                    if ended:
                        ends[number] = time.perf_counter() - began_s
    for sock in socks:
        sock.close()
    yield list(ends.values())


if __name__ == "__main__":
    raise_limit()
    while True:
        for seconds in one_round(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])):
            print(json.dumps(seconds), flush=True)
