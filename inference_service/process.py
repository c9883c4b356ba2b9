"""A replica with its APIs: loaded, listening, and drained at a signal."""

import asyncio
import atexit
from collections.abc import Collection
from contextlib import ExitStack
from functools import partial

import structlog

from inference_service.apis.children import ApiProcesses
from inference_service.http.server import HttpServer
from inference_service.http.wire import protocol
from inference_service.replica import TELL_S, Replica, end_broken
from inference_service.rpc import adapters as adapters_rpc
from inference_service.rpc.adapters import AdapterServicer
from inference_service.rpc.servicer import SERVICE_NAME, InferenceServicer
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
    ready, operators, tracing = replica.ready, replica.operators, replica.tracing
    stall_s = settings.stall_timeout_s
    count = settings.sizes(ready.device).api_processes
    services = {
        SERVICE_NAME: InferenceServicer(ready.service).register,
        adapters_rpc.SERVICE_NAME: AdapterServicer(operators.manager).register,
    }
    patience = calls.Patience(read_s=stall_s, pause_s=stall_s)
    serve = partial(RpcServer, guard=guard, tracing=tracing, patience=patience)
    sockets = ExitStack()
    atexit.register(sockets.close)
    relay = f"unix:{sockets.enter_context(socket_folder())}/engine" if count else ""
    inside = Guard(guard.keyring) if count else guard  # TLS ends at the API processes
    server = serve(relay or settings.grpc, services, guard=inside)
    servers: dict[str, HttpServer | RpcServer] = {}
    if settings.http and not count:
        http_patience = protocol.ClientTimeouts(read_s=stall_s, pause_s=stall_s)
        servers["http"] = HttpServer(settings.http, ready.service, guard, tracing, http_patience)
    servers["grpc"] = server
    bound = {name: await each.start() for name, each in servers.items()}
    apis = None
    if count:
        keyless = guard.keyring is None
        apis = ApiProcesses(settings, ready.service, count, services, relay, keyless=keyless)
        bound = await stop.starting(apis.start())
    every: list[ApiServer] = [*([apis] if apis else []), *servers.values()]
    replica.begin(partial(_refuse, every))
    if apis is not None:
        await apis.set_serving()
    await server.set_serving(True)
    log.info("inference service ready", **bound, guarded_by=guard.label, deployment=settings.deployment)
    operators.begin()
    number = await stop.wait_beside(replica.until_over())
    if number or operators.outdated.is_set():
        await leave(every, settings.drain_delay_s, ready.engine.ended())
    await operators.end()
    drain_s = settings.drain_timeout_s if number or operators.outdated.is_set() else TELL_S
    ready.engine.resume()  # what stands still could not end
    log.info("draining", signal=number.name if number else "none", timeout_s=drain_s)
    finished = await asyncio.gather(*(each.drain(drain_s, ready.engine.cut) for each in every))
    sockets.close()
    why = await replica.stop()
    if why is not None:
        end_broken(why)
    return 0 if all(finished) else 1


async def _refuse(servers: Collection[ApiServer]) -> None:
    """Fail health checks from now on."""
    for each in servers:
        await each.refuse()
