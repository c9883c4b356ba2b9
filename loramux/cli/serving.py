"""``loramux models`` and ``health``: what runs, and the model names that are completed."""

import asyncio
import difflib
import time
from collections.abc import Sequence
from typing import Annotated

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loramux.cli import shell
from loramux.cli.documents import emit
from loramux.cli.exits import Exit
from loramux.cli.tables import kind
from loramux.client import INFERENCE, Client
from loramux.connection import Credentials
from loramux_shared.bundle.names import BASE, names_of
from loramux_shared.faults import Fault, ModelNotFound, PermissionDenied, ServerUnavailable, Unauthenticated
from loramux_shared.operations import AdapterStatus
from loramux_shared.rpc.status import CallFailed, fault_of
from loramux_shared.wording import listed

CHECK_S = 5.0
POLL_S = 0.1
SERVING = "SERVING"
SPARE = ("base", "warnings", "modules", "pinned", "kind", "in use", "digest", "rank", "tier")
"""Columns of the models that a narrow terminal does without, the least important first."""


@shell.command
def models(
    address: shell.Grpc = INFERENCE,
    wide: Annotated[bool, typer.Option("--wide", help="Show all columns, also on a narrow terminal.")] = False,
    as_json: shell.Json = False,
) -> None:
    """List the models that are served: base first, then adapters.

    With a key that has the scope admin, also where each is. A narrow terminal
    shows the columns for which it has room.

    Example: loramux models --grpc 127.0.0.1:50052
    """
    with Client(inference=address) as client, shell.working("asking for the models"):
        found = client.models()
        adapters = _adapters(client)
    if as_json:
        emit({"models": found} | ({"adapters": adapters} if adapters is not None else {}))
        return
    headers: tuple[str, ...] = ("model", "base", "kind", "rank", "modules", "digest", "warnings")
    where = {each.name: each for each in adapters or ()}
    rows = [
        (
            model.name,
            model.parent or "-",
            kind(model.kinds, model.replaced_rows, model.num_labels) or "-",
            shell.numbers(model.ranks),
            shell.modules(model.modules),
            shell.digest(model.digest),
            ", ".join(model.warnings) or "-",
            *(_where(where.get(model.name)) if adapters is not None else ()),
        )
        for model in found
    ]
    headers += ("tier", "pinned", "in use") if adapters is not None else ()
    shell.table(headers, rows, spare=SPARE, wide=wide)


def _adapters(client: Client) -> list[AdapterStatus] | None:
    """Return where adapters are, or None where the key may not know, or the server is older than this."""
    try:
        return client.adapters()
    except (PermissionDenied, Unauthenticated):
        return None
    except CallFailed as fault:
        if fault.code is grpc.StatusCode.UNIMPLEMENTED:
            return None
        raise


def _where(adapter: AdapterStatus | None) -> tuple[str, str, str]:
    if adapter is None:
        return ("device", "-", "-")
    tier = f"{adapter.tier}: {adapter.last_failure.reason}" if adapter.last_failure else adapter.tier
    return (tier, "yes" if adapter.pinned else "-", str(adapter.in_flight + adapter.waiting))


@shell.command
def health(
    address: Annotated[str, typer.Argument(metavar="[ADDRESS]", help="HOST:PORT")] = INFERENCE,
    service: Annotated[
        str, typer.Option("--service", metavar="NAME", help="Full name of a service; empty: the server.")
    ] = "",
    wait_s: Annotated[
        float, typer.Option("--wait", metavar="SECONDS", min=0, help="Seconds of retries.")
    ] = 0.0,
    as_json: shell.Json = False,
) -> None:
    """Ask a server for its health; exit 0 when it is SERVING.

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


async def check(address: str, service: str = "", tls_name: str | None = None) -> str:
    """Return a server's health, for example ``SERVING``."""
    async with Credentials(tls_name=tls_name).channel(address, grpc.aio) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=CHECK_S)
        except grpc.RpcError as error:
            raise fault_of(error, address) from error
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


COMPLETION_S = 1.0
"""Bound of a completion, since a person waits after TAB; a slower server is not asked further."""


def unserved(model: str, served: Sequence[str]) -> list[str]:
    """Return what is not served of a model, or of the parts of ``NAME*SCALE+NAME``."""
    if model in served:
        return []
    return [name for name in names_of(model) if name not in (*served, BASE)]


def no_such_model(name: str, served: Sequence[str]) -> ModelNotFound:
    """Return the failure for a name that is not served, with the nearest that is."""
    near = difflib.get_close_matches(name, served, n=1, cutoff=0.7)
    meant = f" Did you mean {near[0]}?" if near else ""
    return ModelNotFound(f"no model {name!r}; served are {listed(served)}.{meant}")


def complete_model(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the served names that begin so; none when no server answers at once."""
    try:
        with Client(inference=ctx.params.get("grpc") or INFERENCE, timeout_s=COMPLETION_S) as client:
            return [each.name for each in client.models() if each.name.startswith(incomplete)]
    except Fault:
        return []
