"""``python -m inference_service``: serve a deployment until SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Collection
from functools import partial

import structlog

from inference_service.openai_api import protocol
from inference_service.openai_api.server import HttpServer
from inference_service.replica import TELL_S, Replica, end_broken
from inference_service.rpc import adapters as adapters_rpc
from inference_service.rpc.adapters import AdapterServicer
from inference_service.rpc.servicer import SERVICE_NAME, InferenceServicer, register
from inference_service.vllm_rpc.services import Services, VllmServices
from loramux_shared.access.guard import open_guard
from loramux_shared.descriptors import raise_limit
from loramux_shared.faults import Fault, SettingsInvalid
from loramux_shared.rpc import calls
from loramux_shared.rpc.listening import require_free
from loramux_shared.rpc.server import RpcServer
from loramux_shared.rpc.stopping import Stop, leave
from loramux_shared.settings import InferenceSettings, load_settings
from loramux_shared.telemetry import log_to_stderr

log = structlog.get_logger()

Door = RpcServer | HttpServer
FLAGS = {
    "store": "URI of the object store",
    "grpc": "HOST:PORT to listen on",
    "http": "HOST:PORT of the OpenAI HTTP door; it is closed when not given",
    "model_doors": "MODEL=HOST:PORT, by commas: gRPC addresses of one model each",
    "deployment": "the deployment to serve",
    "backend": "auto, native, torch or triton",
    "device": "auto, cpu or cuda",
    "dtype": "auto, float32, bfloat16 or float16",
    "threads": "threads that compute on the CPU",
    "keys_file": "the API keys, as `loramux keys new` writes them",
    "follow_interval_s": "seconds between two looks at the current generation; 0 serves that of the start",
    "on_base_change": "stay or exit, when a generation needs a restart",
    "builder": "HOST:PORT of a builder that tells of new generations",
}


def main() -> int:
    """Run the service.

    The exit status is 0 after a drain, 1 when it cannot serve or had to cut requests off, 2 for bad settings,
    and BROKEN when it can compute no more.
    """
    parser = argparse.ArgumentParser(prog="inference_service", description=__doc__)
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=text)
    parser.add_argument(
        "--local-root", action="append", dest="local_roots", help="a folder that LOCAL may read"
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        dest="allowed_hosts",
        help="a host that REMOTE_URL may reach though its address is not public",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        default=None,
        help="listen beyond this machine though nobody has to show a key",
    )
    flags = vars(parser.parse_args())
    for name in ("local_roots", "allowed_hosts"):
        if flags[name]:
            flags[name] = tuple(flags[name])
    log_to_stderr()
    try:
        settings = load_settings(InferenceSettings, **flags)
        log_to_stderr(settings.log_format)
        return asyncio.run(serve(settings))
    except Fault as fault:
        sys.stderr.write(f"inference_service: {fault.reason}: {fault}\n")
        return 2 if isinstance(fault, SettingsInvalid) else 1


async def serve(settings: InferenceSettings) -> int:
    """Load, listen, and drain at SIGTERM or SIGINT, or end when the engine can go on no more."""
    stop = Stop()
    raise_limit()
    given = (settings.grpc, settings.http, *settings.addresses_of_models.values())
    addresses = [address for address in given if address]
    guard = open_guard(settings, *addresses)
    for address in addresses:
        require_free(address)  # before minutes of loading
    replica = await stop.starting(Replica.load(settings))
    ready, operators, tracing = replica.ready, replica.operators, replica.tracing
    stall_s = settings.stall_timeout_s
    vllm = VllmServices(ready.service, operators.manager)
    services: Services = {
        SERVICE_NAME: partial(register, InferenceServicer(ready.service)),
        adapters_rpc.SERVICE_NAME: partial(adapters_rpc.register, AdapterServicer(operators.manager)),
        **vllm.of_all_models(lambda: server.serving),
    }
    patience = calls.Patience(read_s=stall_s)
    server = RpcServer(settings.grpc, services, guard, tracing, patience)
    doors: dict[str, Door] = {}
    if settings.http:
        http_patience = protocol.Patience(read_s=stall_s)
        doors["http"] = HttpServer(
            settings.http, ready.service, guard, tracing, http_patience, adapters=operators.manager
        )
    doors["grpc"] = server
    of_models = {
        model: RpcServer(address, vllm.of_model(model, lambda: server.serving), guard, tracing, patience)
        for model, address in settings.addresses_of_models.items()
    }
    bound = {name: await door.start() for name, door in doors.items()}
    if of_models:
        bound["model_doors"] = ", ".join([f"{name}={await door.start()}" for name, door in of_models.items()])
    every = [*doors.values(), *of_models.values()]
    replica.begin(partial(_refuse, every))
    for each in (*of_models.values(), server):
        await each.set_serving(True)
    log.info("inference service ready", **bound, guarded_by=guard.shown, deployment=settings.deployment)
    operators.begin()
    number = await stop.wait_beside(replica.until_over())
    if number or operators.outdated.is_set():
        await leave(every, settings.drain_delay_s, ready.engine.ended())
    await operators.end()
    drain_s = settings.drain_timeout_s if number or operators.outdated.is_set() else TELL_S
    ready.engine.resume()  # what stands still could not end
    log.info("draining", signal=number.name if number else "none", timeout_s=drain_s)
    finished = await asyncio.gather(*(door.drain(drain_s, ready.engine.cut) for door in every))
    why = await replica.stop()
    if why is not None:
        end_broken(why)
    return 0 if all(finished) else 1


async def _refuse(doors: Collection[Door]) -> None:
    """Say to whoever asks for health that there is none."""
    for door in doors:
        await door.refuse()


if __name__ == "__main__":
    sys.exit(main())
