"""Both APIs before the engine, the service and the telemetry of a replica; only the model is left out.

``python -m benchmarks.streams_server STEP_MS INTERVAL_MS [API_PROCESSES]`` prints its addresses and
serves until it is killed.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.on_gpu.checkpoint import write_tokenizer
from benchmarks.streams_clients import MODEL
from inference_service.adapters.catalog import Catalog
from inference_service.adapters.served_model import ServedModel
from inference_service.core.sequence import Batch, Token
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.engine import Engine
from inference_service.engine.queues import SchedulerLimits
from inference_service.engine.residents import AlwaysResident
from inference_service.engine.runner import Pending
from inference_service.http.server import HttpServer
from inference_service.processes.children import ApiProcesses
from inference_service.processes.host import ApiHost
from inference_service.replica import SWITCH_S, keep_what_is_loaded
from inference_service.rpc.servicer import SERVICE_NAME, InferenceServicer, register
from inference_service.serving.engine_thread import EngineThread
from inference_service.serving.service import GenerationService, ServingLimits
from inference_service.serving.telemetry.request_log import open_watchers
from inference_service.text.text import Text
from loramux_shared.process import log_to_stderr, raise_limit
from loramux_shared.rpc.server import CORE, RpcServer
from loramux_shared.settings import InferenceSettings

VOCAB: Final = 512
SEATS: Final = 4096
LONGEST: Final = 8192
BLOCK_SIZE: Final = 64
BLOCKS: Final = 1 << 17


class Instant:
    """A runner whose steps take so long and no processor; each sequence gets the same token."""

    depth = 0

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    def submit(self, batch: Batch) -> Pending:
        """Begin a step."""
        until = time.monotonic() + self._step_s
        seqs = tuple(chunk.seq for chunk in batch.chunks if chunk.samples)

        def wait() -> list[Token]:
            time.sleep(max(0.0, until - time.monotonic()))
            return [Token(7)] * len(seqs)

        return Pending(seqs, wait)


def service(folder: Path, step_s: float, interval_s: float) -> tuple[GenerationService, EngineThread]:
    """Return a service that has one model, and its engine."""
    write_tokenizer(folder / "tokenizer.json", VOCAB)
    limits = SchedulerLimits(max_tokens=8192, max_seqs=SEATS, max_adapters=1, max_seq_len=LONGEST)
    blocks = BlockManager(BLOCKS, BLOCK_SIZE, prefix_cache=False)
    engine = Engine(Instant(step_s), limits, blocks, AlwaysResident())
    thread = EngineThread(engine, SEATS, lambda: None, step_timeout_s=60, interval_s=interval_s)
    catalog = Catalog(1, MODEL, [ServedModel(MODEL)])
    bounds = ServingLimits(LONGEST, frozenset())
    return GenerationService(catalog, Text.load(folder, VOCAB), thread, bounds, open_watchers()), thread


async def serve(step_s: float, interval_s: float, api_processes: int = 0) -> None:
    """Serve until it is cancelled."""
    raise_limit()
    sys.setswitchinterval(SWITCH_S)
    with tempfile.TemporaryDirectory(prefix="loramux-servers-") as folder:
        made, thread = service(Path(folder), step_s, interval_s)
        inside, apis = f"unix:{folder}/engine", None
        rpc = RpcServer(
            inside if api_processes else "127.0.0.1:0",
            {SERVICE_NAME: partial(register, InferenceServicer(made))},
        )
        http = HttpServer("127.0.0.1:0", made)
        addresses = {"grpc": await rpc.start(), "http": await http.start()}
        if api_processes:
            settings = InferenceSettings(deployment=MODEL, grpc="127.0.0.1:0", http="127.0.0.1:0")
            host = ApiHost(made, keyless=True)
            apis = ApiProcesses(settings, host, api_processes, (SERVICE_NAME,), CORE, inside)
            addresses = await apis.start()
            await apis.set_serving()
        keep_what_is_loaded()
        thread.start()
        await rpc.set_serving(True)
        print(json.dumps(addresses), flush=True)
        try:
            await thread.ended()
        finally:
            await asyncio.gather(*(each.drain(0) for each in (rpc, http, apis) if each is not None))
            await thread.stop()


if __name__ == "__main__":
    log_to_stderr("json")
    asyncio.run(serve(float(sys.argv[1]) / 1e3, float(sys.argv[2]) / 1e3, *map(int, sys.argv[3:])))
