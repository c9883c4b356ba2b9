"""Several replicas as if they were one: what the clients call where they were given more than one address.

Each replica has a channel of its own, whose health gRPC watches by itself (`HEALTHY`): a call on one that is
away or NOT_SERVING fails at once and unsent. `placement` chooses, `trip` asks the next one.
"""

import asyncio
import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

import grpc

from loramux.connection import GENERATE, Address, Calls, Credentials
from loramux.fleet.members import Members
from loramux.fleet.placement import Placement
from loramux.fleet.trip import Trip
from loramux_shared.faults import ServerUnavailable
from loramux_shared.routes import INFERENCE_SERVICE, OF_A_MODEL
from loramux_shared.rpc.status import CallFailed, fault_of

CONNECT_S: Final = 3
"""For a connection and its handshakes; gRPC's default is 20 s."""
HEALTHY: Final = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],  # one address: only this policy watches health
        "healthCheckConfig": {"serviceName": INFERENCE_SERVICE},
    }
)
PING_S: Final = 10
PING_TIMEOUT_S: Final = 5
"""A replica that hangs is left sooner than where there is no other."""
OPTIONS: Final = (
    ("grpc.service_config", HEALTHY),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.min_reconnect_backoff_ms", CONNECT_S * 1000),
    ("grpc.keepalive_time_ms", PING_S * 1000),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_S * 1000),
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_S * 1000),
)
STREAMS: Final = (*OF_A_MODEL, "WatchReplica")
REPEATED: Final = (*OF_A_MODEL, "Get", "List", "Pin", "Unpin", "Watch")
"""Prefixes of methods that may be called twice with the same effect."""


@dataclass
class Link:
    """A channel to a replica, and the methods of services on it."""

    channel: Any
    calls: dict[Callable[[Any], Any], Calls] = field(default_factory=dict)


class Fleet:
    """Channels to replicas; kind is ``grpc`` or ``grpc.aio``."""

    def __init__(
        self, members: Members, credentials: Credentials, kind: Any, placement: Placement | None = None
    ) -> None:
        self.members = members
        self._placement = placement or Placement()
        self._credentials = credentials
        self._kind = kind
        self._lock = threading.Lock()
        self._where: tuple[Address, ...] = ()
        self._links: dict[str, Link] = {}
        self._closed = False

    def trip(self, method: str, timeout: float | None) -> Trip:
        """Return the way of a request."""
        return Trip(self._placement, timeout, repeat=method.startswith(REPEATED))

    def look(self) -> list[Any]:
        """Take notice of who there is now; return the channels to those that are gone.

        Raises:
            ServerUnavailable: no name resolves.
        """
        where = self.members.now()
        with self._lock:
            if where is not self._where:
                self._where = where
                self._placement.replace([each.target for each in where])
            gone = [target for target in self._links if self._placement.is_gone(target)]
            return [self._links.pop(target).channel for target in gone]

    def link(self, target: str, stub: Callable[[Any], Any]) -> Calls:
        """Return a service's methods on one replica.

        Raises:
            CallFailed: the client was closed.
        """
        with self._lock:
            if self._closed:
                raise CallFailed("CANCELLED: the client was closed", grpc.StatusCode.CANCELLED)
            link = self._links.get(target)
            if link is None:
                name = next((each.name for each in self._where if each.target == target), "")
                credentials = replace(self._credentials, tls_name=name) if name else self._credentials
                channel = credentials.channel(target, self._kind, OPTIONS)
                link = self._links[target] = Link(channel)
            if stub not in link.calls:
                link.calls[stub] = Calls(stub(link.channel), self._credentials)
            return link.calls[stub]

    def failed(self, trip: Trip, error: grpc.RpcError, target: str, *, answered: bool = False) -> None:
        """Return where another replica may be asked; raises the error's fault where not."""
        fault = fault_of(error, target)
        if isinstance(fault, ServerUnavailable):
            self.members.doubt()
        trip.failed(fault, answered=answered)

    def calls(self, stub: Callable[[Any], Any]) -> Any:
        """Return the methods of a service, as those of one server."""
        return (FleetCalls if self._kind is grpc else AsyncFleetCalls)(self, stub)

    def close(self) -> list[Any]:
        """Open no further channels; return the open ones, which the caller closes."""
        with self._lock:
            self._closed = True
            return [link.channel for link in self._links.values()]


class _Calls:
    """The methods of a service, as those of one server."""

    def __init__(self, fleet: Fleet, stub: Callable[[Any], Any]) -> None:
        self._fleet = fleet
        self._stub = stub


class FleetCalls(_Calls):
    """For threads."""

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(request: Any, timeout: float | None = None) -> Any:
            trip = self._fleet.trip(method, timeout)
            if method in STREAMS:
                return FleetStream(self._fleet, self._stub, method, request, trip)
            try:
                while True:
                    _close(self._fleet.look())
                    target = trip.begin()
                    try:
                        calls = self._fleet.link(target, self._stub)
                        return getattr(calls, method)(request, timeout=trip.left_s)
                    except grpc.RpcError as error:
                        self._fleet.failed(trip, error, target)
            finally:
                trip.end()

        return call


class AsyncFleetCalls(_Calls):
    """On an event loop."""

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(request: Any, timeout: float | None = None) -> Any:
            trip = self._fleet.trip(method, timeout)
            if method in STREAMS:
                return AsyncFleetStream(self._fleet, self._stub, method, request, trip)
            return self._unary(method, request, trip)

        return call

    async def _unary(self, method: str, request: Any, trip: Trip) -> Any:
        try:
            while True:
                await _look(self._fleet)
                target = trip.begin()
                try:
                    calls = self._fleet.link(target, self._stub)
                    return await getattr(calls, method)(request, timeout=trip.left_s)
                except grpc.RpcError as error:
                    self._fleet.failed(trip, error, target)
        finally:
            trip.end()


class _Stream:
    """A stream that begins again elsewhere, until there is something of its answer.

    That a replica took a request is no part of the answer yet, and is held back.
    """

    def __init__(self, fleet: Fleet, stub: Callable[[Any], Any], method: str, request: Any, trip: Trip) -> None:
        self._fleet, self._stub, self._method, self._request, self._trip = fleet, stub, method, request, trip
        self._target = ""
        self._call: Any = None
        self._messages: Any = None
        self._held: deque[Any] = deque()
        self._answered = False

    def cancel(self) -> None:
        """End the request at its replica."""
        if self._call is not None:
            self._call.cancel()
        self._trip.end()

    def _start(self) -> None:
        self._target = self._trip.begin()
        calls = self._fleet.link(self._target, self._stub)
        self._call = getattr(calls, self._method)(self._request, timeout=self._trip.left_s)

    def _hold(self, message: Any) -> None:
        self._held.append(message)
        self._answered = self._answered or self._method != GENERATE or not message.HasField("started")

    def _ended(self) -> bool:
        """Note the end; True when all of it was given."""
        self._trip.end()
        self._answered = True
        return not self._held

    def _failed(self, error: grpc.RpcError) -> None:
        self._messages = None
        self._fleet.failed(self._trip, error, self._target, answered=self._answered)
        self._held.clear()


class FleetStream(_Stream):
    """One for threads."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while not (self._answered and self._held):
            try:
                if self._messages is None:
                    _close(self._fleet.look())
                    self._start()
                    self._messages = iter(self._call)
                self._hold(next(self._messages))
            except StopIteration:
                if self._ended():
                    raise
            except grpc.RpcError as error:
                self._failed(error)
        return self._held.popleft()


class AsyncFleetStream(_Stream):
    """One for an event loop."""

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        while not (self._answered and self._held):
            try:
                if self._messages is None:
                    await _look(self._fleet)
                    self._start()
                    self._messages = aiter(self._call)
                self._hold(await anext(self._messages))
            except StopAsyncIteration:
                if self._ended():
                    raise
            except grpc.RpcError as error:
                self._failed(error)
        return self._held.popleft()


def _close(channels: list[Any]) -> None:
    for channel in channels:
        channel.close()


async def _look(fleet: Fleet) -> None:
    if not fleet.members.known:
        await asyncio.to_thread(fleet.members.now)
    for channel in fleet.look():
        await channel.close()
