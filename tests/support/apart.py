"""Services whose APIs stand behind a channel, as in an API process; both ends are in this process."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from inference_service.api.http.server import HttpServer
from inference_service.api.processes.channel import Channel
from inference_service.api.processes.host import ApiHost, ApiPeer
from inference_service.api.processes.relay import HttpRelay
from inference_service.api.processes.remote import RemoteApi, deployed_to, served_to
from inference_service.api.requests.service import GenerationService
from inference_service.api.rpc.servicer import InferenceServicer
from inference_service.driver.engine_thread import EngineThread
from loramux_shared.access.guard import NOBODY_GUARDS, Guard


class Loopback(asyncio.Transport):
    """Hands bytes to the other end in the next turn of the event loop."""

    def __init__(self, own: Channel) -> None:
        super().__init__()
        self._own = own
        self.other: Channel

    def write(self, data: Any) -> None:
        asyncio.get_running_loop().call_soon(self._pass, bytes(data))

    def _pass(self, data: bytes) -> None:
        if self.other.is_open:
            self.other.data_received(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        """Let both ends lose each other."""
        for end in (self._own, self.other):
            if end.is_open:
                asyncio.get_running_loop().call_soon(end.connection_lost, None)


def connect(one: Channel, other: Channel) -> None:
    there, back = Loopback(one), Loopback(other)
    there.other, back.other = other, one
    one.connection_made(there)
    other.connection_made(back)


class Apart:
    """A service behind a channel, and what relays the other calls."""

    def __init__(self, service: GenerationService, keyless: bool = True) -> None:
        self.host = ApiHost(service, keyless=keyless)
        self.peer = ApiPeer(self.host, lambda: None)
        self.host.peers.add(self.peer)
        watchers = service.watchers[1:]
        self.channel = Channel({}, {"collect": lambda: self.api.collect()}, lambda: self.api.driver.end())
        self.api = RemoteApi.open(self.channel, served_to(service), service.parsers_of, watchers)
        self.service = self.api.service
        connect(self.peer.channel, self.channel)
        catalog = service.local.catalog
        catalog.watchers.append(lambda: self.peer.channel.say("deployed", deployed_to(catalog)))
        self.relay = HttpRelay(self.channel)


def apart(service: Any, keyless: bool = True) -> Apart | None:
    """Return a service behind a channel, one for each; None for fakes."""
    if type(service) is not GenerationService or type(service.local.engine) is not EngineThread:
        return None
    known = vars(service).get("_apart")
    if known is None:
        known = Apart(service, keyless)
        vars(service)["_apart"] = known
    return known


@contextmanager
def all_apart() -> Iterator[None]:
    """Put every API that is made in this block behind a channel."""
    make_http, make_rpc = HttpServer.__init__, InferenceServicer.__init__

    def http(
        self: HttpServer, address: str, service: Any, guard: Guard = NOBODY_GUARDS, *rest: Any, **more: Any
    ) -> None:
        if (far := apart(service, guard.keyring is None)) is not None:
            make_http(self, address, far.service, guard, *rest, **more, relay=far.relay)
            if "adapters" in more:
                far.host.app.state.adapters = more["adapters"]
        else:
            make_http(self, address, service, guard, *rest, **more)

    def rpc(self: InferenceServicer, service: Any) -> None:
        far = apart(service)
        make_rpc(self, service if far is None else far.service)
        if far is not None:
            near = InferenceServicer.__new__(InferenceServicer)
            make_rpc(near, service)
            vars(self)["ListModels"] = near.ListModels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HttpServer, "__init__", http)
        patch.setattr(InferenceServicer, "__init__", rpc)
        yield
