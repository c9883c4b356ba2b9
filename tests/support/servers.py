"""Servers of APIs on free ports of the loopback address."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from loramux_shared.rpc.server import RpcServer
from tests.support.waiting import BOUND_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from inference_service.api.http.server import HttpServer

Server = TypeVar("Server", "HttpServer", RpcServer)
ANY_PORT = "127.0.0.1:0"


@asynccontextmanager
async def serve(server: Server, drain_s: float = BOUND_S) -> AsyncIterator[Server]:
    """Run a server for as long as the block takes, and let clients see that it is healthy."""
    await server.start()
    if isinstance(server, RpcServer):
        await server.set_serving(True)
    try:
        yield server
    finally:
        await server.drain(drain_s)
