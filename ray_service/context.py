"""A call inside a replica, with what a servicer and our interceptors ask of gRPC's context."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, NoReturn

import grpc

from loramux.inference.v1 import inference_pb2 as pb
from ray_service.calls import End, Metadata, RpcCall

Uploads = asyncio.Queue[bytes | None]
"""The messages of a request in several; None ends them."""
HELD: Final = ("started", "prompt_logprobs")
"""Events that wait for the first token: as long as nothing was told, another replica may answer."""


class CallContext:
    """The call's own side of gRPC; also what interceptors know of it beforehand."""

    def __init__(self, call: RpcCall, uploads: Uploads | None) -> None:
        self.method = call.method
        self.invocation_metadata = Details(call.metadata)
        self.told: asyncio.Queue[list[bytes] | End | None] = asyncio.Queue()
        """What the answer has so far; None ends it."""
        self._requests = uploads or _one(call.request)
        self._deadline_s = None if call.timeout_s is None else time.monotonic() + call.timeout_s
        self._trailing: Metadata = ()
        self._held: list[bytes] = []
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

    async def write(self, message: Any) -> None:
        """Tell a message, or keep it until there is a token."""
        self._held.append(self._serialize(message))
        if not isinstance(message, pb.GenerateResponse) or message.WhichOneof("event") not in HELD:
            self._flush()

    def close(self) -> None:
        """End the answer."""
        self._flush()
        self.told.put_nowait(None)

    def set_trailing_metadata(self, trailing: Metadata) -> None:
        """Tell this with the status."""
        self._trailing = tuple(tuple(pair) for pair in trailing)  # type: ignore[misc]  # pairs

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        """End the call with a status; what was held is told no more."""
        self._held = []
        self.told.put_nowait(End(code.value[0], details, self._trailing))
        raise grpc.aio.AbortError

    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())

    def cancelled(self) -> bool:
        """False: a call that is cancelled ends here, whoever asks."""
        return False

    def _flush(self) -> None:
        if self._held:
            self.told.put_nowait(self._held)
            self._held = []


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
