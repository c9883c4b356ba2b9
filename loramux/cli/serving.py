"""``loramux models`` and ``loramux health``: what runs."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loramux.cli import shell
from loramux.cli.documents import emit
from loramux.cli.exits import Exit
from loramux.client import INFERENCE, Client
from loramux.connection import Credentials
from loramux_shared.faults import ServerUnavailable
from loramux_shared.rpc.status import fault_of

CHECK_S = 5.0
POLL_S = 0.1
SERVING = "SERVING"


@shell.command
def models(grpc: shell.Grpc = INFERENCE, as_json: shell.Json = False) -> None:
    """List the models that are served: base first, then adapters.

    Example: loramux models --grpc 127.0.0.1:50052
    """
    with Client(inference=grpc) as client, shell.working("asking for the models"):
        found = client.models()
    if as_json:
        emit({"models": found})
        return
    headers = ("model", "base", "rank", "modules", "digest", "warnings")
    rows = [
        (
            model.name,
            model.parent or "-",
            shell.numbers(model.ranks),
            shell.modules(model.modules),
            shell.digest(model.digest),
            ", ".join(model.warnings) or "-",
        )
        for model in found
    ]
    shell.table(headers, rows)


@shell.command
def health(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="HOST:PORT", show_default=False)],
    service: Annotated[
        str, typer.Option("--service", metavar="NAME", help="Full name of one service; empty: the server.")
    ] = "",
    wait_s: Annotated[
        float, typer.Option("--wait", metavar="SECONDS", min=0, help="Try again for so long.")
    ] = 0.0,
    as_json: shell.Json = False,
) -> None:
    """Ask a server for its health; exit 0 when SERVING, else 1.

    Example: loramux health 127.0.0.1:50052 --wait 30
    """
    with shell.working(f"asking {address}"):
        status = asyncio.run(_health(address, service, wait_s))
    if as_json:
        emit({"address": address, "service": service, "status": status})
    else:
        shell.show(status)
    if status != SERVING:
        raise typer.Exit(Exit.FAILED)


async def _health(address: str, service: str, wait_s: float) -> str:
    deadline = time.monotonic() + wait_s
    while True:
        late = time.monotonic() >= deadline
        try:
            status = await check(address, service)
        except ServerUnavailable:
            if late:
                raise
            status = ""
        if late or status == SERVING:
            return status
        await asyncio.sleep(POLL_S)


async def check(address: str, service: str = "") -> str:
    """Return a server's health, for example ``SERVING``."""
    async with Credentials().channel(address, grpc.aio) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=CHECK_S)
        except grpc.RpcError as error:
            raise fault_of(error, address) from error
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
