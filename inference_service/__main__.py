"""``python -m inference_service``: serve a deployment until SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import sys
from collections.abc import Collection, Coroutine
from dataclasses import asdict
from functools import partial
from typing import Any, Final, NoReturn

import structlog

from inference_service.openai_api import protocol
from inference_service.openai_api.server import HttpServer
from inference_service.operators import Operators
from inference_service.rpc import adapters as adapters_rpc
from inference_service.rpc.adapters import AdapterServicer
from inference_service.rpc.servicer import SERVICE_NAME, InferenceServicer, register
from inference_service.serving.telemetry.watchers import open_watchers
from inference_service.startup.load import load_apart
from loramux_shared.access.guard import open_guard
from loramux_shared.descriptors import raise_limit
from loramux_shared.faults import Fault, SettingsInvalid
from loramux_shared.rpc import calls
from loramux_shared.rpc.listening import require_free
from loramux_shared.rpc.server import RpcServer
from loramux_shared.rpc.stopping import Stop, leave
from loramux_shared.settings import InferenceSettings, load_settings
from loramux_shared.storage.open import open_store
from loramux_shared.storage.patient import PatientStore
from loramux_shared.telemetry import log_to_stderr
from loramux_shared.tracing.setup import open_tracing

log = structlog.get_logger()

Door = RpcServer | HttpServer
BROKEN: Final = 5
"""The exit status of a replica whose device or engine works no more."""
TELL_S: Final = 1.0
"""For clients to read why their requests end, before a broken replica ends itself."""
SWITCH_S: Final = 0.0005
"""How long the engine's thread waits for the interpreter at most, while another one packs an adapter; 5 ms are
Python's own. See docs/performance.md."""
START_PAUSES_S: Final = (1.0,)
"""Before a store that did not answer is asked once more; whoever runs this starts it again."""
FLAGS = {
    "store": "URI of the object store",
    "grpc": "HOST:PORT to listen on",
    "http": "HOST:PORT of the OpenAI HTTP door; it is closed when not given",
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
    sys.setswitchinterval(SWITCH_S)
    addresses = [address for address in (settings.grpc, settings.http) if address]
    guard = open_guard(settings, *addresses)
    for address in addresses:
        require_free(address)  # before minutes of loading
    tracing = open_tracing("loramux-inference")
    watchers = open_watchers(tracing.tracer if tracing else None, log_prompts=settings.log_prompts)
    store = PatientStore(open_store(settings.store), pauses_s=START_PAUSES_S)
    ready = await stop.starting(load_apart(settings, store, watchers))
    servicer = InferenceServicer(ready.service)
    operators = Operators(settings, store, ready)
    adapters = operators.manager
    stall_s = settings.stall_timeout_s
    server = RpcServer(
        settings.grpc,
        {
            SERVICE_NAME: partial(register, servicer),
            adapters_rpc.SERVICE_NAME: partial(adapters_rpc.register, AdapterServicer(adapters)),
        },
        guard,
        tracing,
        calls.Patience(read_s=stall_s),
    )
    doors: dict[str, Door] = {}
    if settings.http:
        patience = protocol.Patience(read_s=stall_s)
        doors["http"] = HttpServer(settings.http, ready.service, guard, tracing, patience, adapters=adapters)
    doors["grpc"] = server
    bound = {name: await door.start() for name, door in doors.items()}
    keep_what_is_loaded()
    ready.engine.start(partial(_refuse, doors.values()))
    await server.set_serving(True)
    log.info("inference service ready", **bound, guarded_by=guard.shown, deployment=settings.deployment)
    operators.begin()
    number = await stop.wait_beside(_first(ready.engine.ended(), operators.outdated.wait()))
    if number or operators.outdated.is_set():
        await leave(doors.values(), settings.drain_delay_s, ready.engine.ended())
    await operators.end()
    drain_s = settings.drain_timeout_s if number or operators.outdated.is_set() else TELL_S
    ready.engine.resume()  # what stands still could not end
    log.info("draining", signal=number.name if number else "none", timeout_s=drain_s)
    finished = await asyncio.gather(*(door.drain(drain_s, ready.engine.cut) for door in doors.values()))
    stats = ready.engine.stats
    why = await ready.engine.stop()
    if ready.bank is not None:
        ready.bank.close()
    if tracing is not None:
        await asyncio.to_thread(tracing.close)
    log.info("inference service stopped", hit_rate=round(stats.prefix_hit_rate, 3), **asdict(stats))
    if why is not None:
        _end_broken(why)
    return 0 if all(finished) else 1


def keep_what_is_loaded() -> None:
    """Let the garbage collector look no more at what there is: 370,000 objects, which took it 200 ms."""
    gc.collect()
    gc.freeze()


async def _first(*works: Coroutine[Any, Any, object]) -> None:
    """Wait until one of them ends."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


async def _refuse(doors: Collection[Door]) -> None:
    """Say to whoever asks for health that there is none."""
    for door in doors:
        await door.refuse()


def _end_broken(why: str) -> NoReturn:
    """End at once: a step may hang for good, and a broken device may hang or abort whatever cleans up."""
    log.critical("the replica is broken and ends; start it again", why=why, status=BROKEN)
    sys.stderr.flush()
    os._exit(BROKEN)


if __name__ == "__main__":
    sys.exit(main())
