"""``python -m inference_service``: serve a deployment until SIGTERM.

What can be refused is refused before torch is imported, which takes seconds.
"""

import os
import signal

# Before numpy is imported: its own threads, awake behind each score head, halve the speed of the engine's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C within the imports ends it without a traceback

import argparse
import asyncio
import sys
from importlib import import_module

import structlog

from inference_service.store import open_batches, open_replica_store
from loramux_shared.access.guard import open_guard
from loramux_shared.bundle.deployments import require_deployment
from loramux_shared.faults import Fault, SettingsInvalid
from loramux_shared.process import log_to_stderr, raise_limit, report
from loramux_shared.rpc.options import require_free
from loramux_shared.rpc.stopping import Stop
from loramux_shared.settings import InferenceSettings, read_flags, require_triton, variable

log = structlog.get_logger()

FLAGS = {
    "store": "URI of the object store",
    "grpc": "HOST:PORT to listen on",
    "http": "HOST:PORT of the HTTP APIs; closed when not given",
    "api_processes": "processes that answer both APIs beside the engine's; 0: none; auto",
    "batch_store": "URI of the store of files and batches; off when not given",
    "deployment": "the deployment to serve",
    "backend": "auto, native, torch or triton",
    "device": "auto, cpu or cuda",
    "dtype": "auto, float32, bfloat16 or float16",
    "tensor_parallel": "processes that compute the base together, on a GPU each",
    "threads": "threads that compute on the CPU",
    "keys_file": "the API keys, as `loramux keys new` writes them",
    "follow_interval_s": "seconds between two looks at the current generation; 0 serves that of the start",
    "on_base_change": "stay or exit, when a generation needs a restart",
    "builder": "HOST:PORT of a builder that tells of new generations",
}


def main() -> int:
    """Run the service.

    The exit status is 0 after a drain, 1 when it cannot serve or had to cut requests off, 2 for bad settings,
    and BROKEN when the engine failed.
    """
    parser = argparse.ArgumentParser(prog="inference_service", description=__doc__.partition("\n")[0])
    log_to_stderr()
    try:
        settings = read_flags(InferenceSettings, parser, FLAGS)
        log_to_stderr(settings.log_format)
        return asyncio.run(serve(settings))
    except Fault as fault:
        sys.stderr.write(f"inference_service: {fault.reason}: {fault}\n")
        return 2 if isinstance(fault, SettingsInvalid) else 1


async def serve(settings: InferenceSettings) -> int:
    """Look at settings, keys, addresses and the store, then run the replica to its end.

    Raises:
        SettingsInvalid: a setting, an address or a file of keys or certificates is no good.
        DeploymentNotFound: the store has no such deployment.
        Fault: what the store raises, and what loading does.
    """
    stop = Stop()
    raise_limit()
    addresses = [address for address in (settings.grpc, settings.http) if address]
    guard = open_guard(settings, *addresses)
    for address in addresses:
        require_free(address)
    if (settings.api_processes or 0) > 1 and settings.grpc.startswith("unix:"):
        raise SettingsInvalid(
            f"{variable('api_processes')}={settings.api_processes}, and {variable('grpc')}={settings.grpc}: "
            "expected HOST:PORT, which several processes can share. Listen on one, or set 1."
        )
    if settings.backend == "triton":
        require_triton(settings.backend)
    open_batches(settings)
    store = open_replica_store(settings)
    log.info("reading the deployment", deployment=settings.deployment, store=store.uri)
    await stop.starting(asyncio.to_thread(require_deployment, store, settings.deployment))
    report("importing torch")
    await stop.starting(asyncio.to_thread(import_module, "inference_service.process"))  # a signal ends it
    from inference_service.process import run

    return await run(settings, guard, stop)


if __name__ == "__main__":
    sys.exit(main())
