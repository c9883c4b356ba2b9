"""A replica with its APIs: loaded, listening, and drained at a signal."""

import asyncio
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from signal import Signals

import structlog

from inference_service.api.http.server import HttpServer
from inference_service.api.http.wire import protocol
from inference_service.api.processes.children import ApiProcesses
from inference_service.api.rpc import adapters as adapters_rpc
from inference_service.api.rpc.adapters import AdapterServicer
from inference_service.api.rpc.servicer import SERVICE_NAME, InferenceServicer
from inference_service.replica import TELL_S, Replica, end_broken
from loramux_shared.access.guard import Guard
from loramux_shared.process import socket_folder
from loramux_shared.rpc import calls
from loramux_shared.rpc.server import RpcServer
from loramux_shared.rpc.stopping import Stop, leave
from loramux_shared.settings import InferenceSettings

log = structlog.get_logger()

ApiServer = RpcServer | HttpServer | ApiProcesses


async def run(settings: InferenceSettings, guard: Guard, stop: Stop) -> int:
    """Load, listen, and drain at SIGTERM or SIGINT, or end when the engine failed."""
    replica = await stop.starting(Replica.load(settings))
    with ExitStack() as sockets:
        servers = await _listen(replica, settings, guard, stop, sockets)
        log.info(
            "inference service ready",
            **servers.addresses,
            guarded_by=guard.label,
            deployment=settings.deployment,
        )
        replica.operators.begin()
        number = await stop.wait_beside(replica.until_over())
        finished = await _end(replica, servers.all, settings, number)
    why = await replica.stop()
    if why is not None:
        end_broken(why)
    return 0 if finished else 1


@dataclass(frozen=True)
class Servers:
    """The servers of a replica that listen."""

    all: list[ApiServer]
    addresses: dict[str, str]
    """Bound addresses of the APIs."""


async def _listen(
    replica: Replica, settings: InferenceSettings, guard: Guard, stop: Stop, sockets: ExitStack
) -> Servers:
    """Listen, here and in API processes where settings ask for some, and compute; then health is good."""
    ready, tracing, stall_s = replica.ready, replica.tracing, settings.stall_timeout_s
    count = settings.sizes(ready.device).api_processes
    services = {
        SERVICE_NAME: InferenceServicer(ready.service).register,
        adapters_rpc.SERVICE_NAME: AdapterServicer(replica.operators.manager).register,
    }
    relay = f"unix:{sockets.enter_context(socket_folder())}/engine" if count else ""
    inside = Guard(guard.keyring) if count else guard  # TLS ends at the API processes
    patience = calls.Patience(read_s=stall_s, pause_s=stall_s)
    rpc = RpcServer(relay or settings.grpc, services, inside, tracing, patience)
    servers: dict[str, HttpServer | RpcServer] = {"grpc": rpc}
    if settings.http and not count:
        timeouts = protocol.ClientTimeouts(read_s=stall_s, pause_s=stall_s)
        servers = {"http": HttpServer(settings.http, ready.service, guard, tracing, timeouts), "grpc": rpc}
    addresses = {name: await each.start() for name, each in servers.items()}
    every: list[ApiServer] = list(servers.values())
    apis = None
    if count:
        keyless = guard.keyring is None
        apis = ApiProcesses(settings, ready.service, count, services, relay, keyless=keyless)
        addresses = await stop.starting(apis.start())
        every.insert(0, apis)
    replica.begin(partial(_refuse, every))
    if apis is not None:
        await apis.set_serving()
    await rpc.set_serving(True)
    return Servers(every, addresses)


async def _end(
    replica: Replica, servers: Collection[ApiServer], settings: InferenceSettings, number: Signals | None
) -> bool:
    """Drain after a signal or a failure, or for a start on a newer generation; False where some were cut."""
    engine, is_asked = replica.ready.engine, bool(number) or replica.operators.outdated.is_set()
    if is_asked:
        await leave(servers, settings.drain_delay_s, engine.ended())
    await replica.operators.end()
    drain_s = settings.drain_timeout_s if is_asked else TELL_S
    engine.resume()  # what stands still could not end
    log.info("draining", signal=number.name if number else "none", timeout_s=drain_s)
    return all(await asyncio.gather(*(each.drain(drain_s, engine.cut) for each in servers)))


async def _refuse(servers: Collection[ApiServer]) -> None:
    """Fail health checks from now on."""
    for each in servers:
        await each.refuse()
