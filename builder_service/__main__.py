"""The builder service as a process: settings, store, server, drain."""

import os
import signal

# One core computes one adapter; BLAS threads would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C within the imports ends it without a traceback

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import Final

import structlog

from builder_service.builder import Builder
from builder_service.builds.builds import Builds
from builder_service.rpc.servicer import SERVICE_NAME, BuilderServicer
from loramux_shared.access.guard import Guard, open_guard
from loramux_shared.faults import Fault, SettingsInvalid
from loramux_shared.process import log_to_stderr, raise_limit
from loramux_shared.rpc.calls import Patience
from loramux_shared.rpc.server import RpcServer
from loramux_shared.rpc.stopping import Stop, leave
from loramux_shared.settings import BuilderSettings, read_flags
from loramux_shared.tracing import open_tracing

log = structlog.get_logger()

FLAGS: Final = (
    *("store", "grpc", "work_dir", "secrets_dir", "drain_delay_s", "drain_timeout_s", "max_concurrent_builds"),
    *("parallel_adapters", "build_timeout_s", "max_build_gb", "keys_file"),
)
"""Settings that a flag of the same name sets."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the service until SIGTERM or SIGINT; returns the exit status."""
    log_to_stderr()
    try:
        settings = _settings(arguments)
        log_to_stderr(settings.log_format)
        asyncio.run(serve(settings))
    except SettingsInvalid as fault:
        _say(fault)
        return 2
    except Fault as fault:
        _say(fault)
        return 1
    return 0


async def serve(settings: BuilderSettings) -> None:
    """Serve until a signal, then drain."""
    stop = Stop()
    raise_limit()
    guard = open_guard(settings, settings.grpc)
    builder = await Builder.open(settings)
    builds, checks, identity = builder.builds, builder.checks, builder.identity
    store = builder.context.store.uri
    tracing = open_tracing("loramux-builder")
    patience = Patience(read_s=settings.stall_timeout_s, pause_s=settings.stall_timeout_s)
    services = {SERVICE_NAME: BuilderServicer(builds, checks).register}
    server = RpcServer(settings.grpc, services, guard, tracing, patience)
    metrics = "off"
    if settings.metrics:
        from builder_service.meter import BuildMeter  # which few ask for, and imports Prometheus' client

        meter = BuildMeter(builds.count_running)
        builds.watchers.append(meter.ended)
        hosts = Guard(hosts=settings.http_hosts).hosts_at(settings.metrics)  # they require no key
        metrics = meter.listen(settings.metrics, insecure=settings.insecure, hosts=hosts)
    log.info("reading the journal", store=store, builder=identity.name)
    address, recovered = await stop.starting(_start(server, builds))
    log.info(
        "builder service ready",
        builder=identity.name,
        grpc=address,
        metrics=metrics,
        guarded_by=guard.label,
        store=store,
        builds_taken_up=recovered,
    )
    number = await stop.wait()
    log.info("draining", signal=number.name, timeout_s=settings.drain_timeout_s)
    await leave([server], settings.drain_delay_s)
    checks.stop()
    # The watchers' streams end with the builds, so the builds must end first.
    draining = asyncio.create_task(builds.drain(settings.drain_timeout_s))
    await server.drain(settings.drain_timeout_s + 1)
    await draining
    if tracing is not None:
        await asyncio.to_thread(tracing.close)
    log.info("builder service stopped")


async def _start(server: RpcServer, builds: Builds) -> tuple[str, int]:
    """Take up builds, then listen: calls find what was accepted before; return the address, and how many."""
    server.bind()
    recovered = await builds.recover()
    address = await server.start()
    await server.set_serving(True)
    return address, recovered


def _settings(arguments: Sequence[str] | None) -> BuilderSettings:
    parser = argparse.ArgumentParser(
        prog="python -m builder_service",
        description="Turns adapter repositories into bundles in an object store. "
        "Every setting is also a variable LORAMUX_<NAME>; a flag comes first.",
    )
    texts = {name: BuilderSettings.model_fields[name].description or "" for name in FLAGS}
    return read_flags(BuilderSettings, parser, texts, arguments)


def _say(fault: Fault) -> None:
    sys.stderr.write(f"builder_service: {fault.reason}: {fault}\n")


if __name__ == "__main__":
    sys.exit(main())
