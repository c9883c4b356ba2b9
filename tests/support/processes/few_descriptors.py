"""The HTTP and gRPC APIs in a process with a low limit of open files."""

import asyncio
import os
import resource
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

from loramux_shared.process import log_to_stderr, raise_limit
from tests.support.services.endless import Endless, apis_of


def serve_with_few_descriptors(limit: int, log: Path, peer: Connection) -> None:
    """Serve until killed, with so many descriptors; tells the other end its addresses."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    log_to_stderr("json")
    asyncio.run(_serve(limit, peer))


async def _serve(limit: int, peer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit // 2, limit))
    raise_limit()
    with tempfile.TemporaryDirectory() as folder:
        http, rpc = apis_of(Endless(Path(folder)))
        addresses = {"http": await http.start(), "grpc": await rpc.start()}
        await rpc.set_serving(True)
        peer.send(addresses)
        await asyncio.Event().wait()
