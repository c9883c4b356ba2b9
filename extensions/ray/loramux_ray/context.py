"""A call inside a replica, with what a servicer and our interceptors ask of gRPC's context."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, NoReturn

import grpc

from loramux_ray.calls import End, Metadata, RpcCall

Uploads = asyncio.Queue[bytes | None]
"""The messages of a request in several; None ends them."""


class CallContext:
    """The call's own side of gRPC; also what interceptors know of it beforehand."""

    def __init__(self, call: RpcCall, uploads: Uploads | None) -> None:
        self.method = call.method
        self.invocation_metadata = Details(call.metadata)
        self._parts: asyncio.Queue[bytes | End | None] = asyncio.Queue()
        """Parts of the answer so far; None ends it."""
        self._requests = uploads or _one(call.request)
        self._deadline_s = None if call.timeout_s is None else time.monotonic() + call.timeout_s
        self._trailing: Metadata = ()
        self._parse: Callable[[bytes], Any] = bytes
        self._serialize: Callable[[Any], bytes] = bytes

    def use(self, handler: grpc.RpcMethodHandler) -> None:
        """Read and write the messages of a method."""
        self._parse = handler.request_deserializer or bytes
        self._serialize = handler.response_serializer or bytes

    async def read(self) -> Any:
        """Return the next message of the request, or grpc.aio.EOF."""
        data = await self._requests.get()
        return grpc.aio.EOF if data is None else self._parse(data)

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        """Send nothing: the bridge has no headers."""

    async def write(self, message: Any) -> None:
        """Tell a message."""
        self._parts.put_nowait(self._serialize(message))

    def close(self) -> None:
        """End the answer."""
        self._parts.put_nowait(None)

    async def parts(self) -> AsyncGenerator[list[bytes] | End]:
        """Yield the answer to its end: messages that came together, and a status that is not OK."""
        parts: list[bytes | End | None] = []
        while None not in parts:
            parts = [await self._parts.get()]
            while not self._parts.empty():
                parts.append(self._parts.get_nowait())
            if messages := [each for each in parts if isinstance(each, bytes)]:
                yield messages
            for end in (each for each in parts if isinstance(each, End)):
                yield end

    def set_trailing_metadata(self, trailing: Metadata) -> None:
        """Tell this with the status."""
        self._trailing = tuple(tuple(pair) for pair in trailing)  # type: ignore[misc]  # pairs

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        """End the call with a status."""
        self._parts.put_nowait(End(code.value[0], details, self._trailing))
        raise grpc.aio.AbortError

    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())

    def cancelled(self) -> bool:
        """Return False: a call that is cancelled ends here."""
        return False


class Details(tuple[tuple[str, str | bytes], ...]):
    """The metadata of a call: a field for interceptors, a method for servicers."""

    def __call__(self) -> Metadata:
        """Return it."""
        return self


def _one(request: bytes) -> Uploads:
    requests: Uploads = asyncio.Queue()
    requests.put_nowait(request)
    requests.put_nowait(None)
    return requests
