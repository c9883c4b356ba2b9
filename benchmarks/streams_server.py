"""Both APIs before the engine, the service and the telemetry of a replica; only the model is left out.

``python -m benchmarks.streams_server STEP_MS [API_PROCESSES]`` prints its addresses, and for each line that it
reads the seconds of steps and the number of tokens since the last one; it serves until it is killed.
"""

import asyncio
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.streams_clients import MODEL
from inference_service.adapters.catalog import Catalog
from inference_service.api.http.server import HttpServer
from inference_service.api.processes.children import ApiProcesses
from inference_service.api.requests.service import GenerationService
from inference_service.api.requests.terms import ServingLimits
from inference_service.api.rpc.servicer import SERVICE_NAME, InferenceServicer
from inference_service.core.sequence import Batch, Token
from inference_service.core.served_model import ServedModel
from inference_service.driver.engine_driver import EngineDriver
from inference_service.driver.engine_thread import EngineThread
from inference_service.driver.telemetry.request_log import open_watchers
from inference_service.engine.engine import Engine
from inference_service.engine.execution.runner import Pending
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.engine.scheduling.residents import Residents
from inference_service.replica import SWITCH_S, keep_what_is_loaded
from inference_service.text.text import Text
from loramux_shared.process import log_to_stderr, raise_limit
from loramux_shared.rpc.server import RpcServer
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
        self._began_s = 0.0
        self._steps: list[float] = []
        self._tokens = 0

    def report(self) -> str:
        """Return the seconds between steps and the number of tokens since the last time."""
        found, self._steps, self._tokens = (self._steps, self._tokens), [], 0
        return json.dumps(found)

    def submit(self, batch: Batch) -> Pending:
        """Begin a step."""
        now = time.monotonic()
        self._steps.append(now - self._began_s)
        self._began_s, until = now, now + self._step_s
        seqs = tuple(chunk.seq for chunk in batch.chunks if chunk.samples)
        self._tokens += len(seqs)

        def wait() -> list[Token]:
            time.sleep(max(0.0, until - time.monotonic()))
            return [Token(7)] * len(seqs)

        return Pending(seqs, wait)


def service(
    folder: Path, device: Instant, names: Sequence[str] = (MODEL,)
) -> tuple[GenerationService, EngineThread]:
    """Return a service of models, and its engine; tokens are bytes, as most models' are."""
    words = ["<unk>", *(f"\u0120w{number}" for number in range(1, VOCAB))]
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))  # noqa: S106 - a token of text
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    limits = SchedulerLimits(max_tokens=8192, max_seqs=SEATS, max_adapters=1, max_seq_len=LONGEST)
    blocks = BlockManager(BLOCKS, BLOCK_SIZE, prefix_cache=False)
    engine = Engine(device, limits, blocks, Residents())
    thread = EngineThread(engine, SEATS, lambda: None, step_timeout_s=60)
    catalog = Catalog(1, MODEL, map(ServedModel, names))
    bounds, text = ServingLimits(LONGEST, frozenset()), Text.load(folder, VOCAB)
    driver = EngineDriver(catalog, thread, text, bounds.eos_token_ids)
    return GenerationService(driver, text, bounds, driver.metrics, open_watchers()), thread


async def serve(device: Instant, api_processes: int = 0) -> None:
    """Serve until it is cancelled."""
    raise_limit()
    sys.setswitchinterval(SWITCH_S)
    with tempfile.TemporaryDirectory(prefix="loramux-servers-") as folder:
        made, thread = service(Path(folder), device)
        inside, apis = f"unix:{folder}/engine", None
        rpc = RpcServer(
            inside if api_processes else "127.0.0.1:0", {SERVICE_NAME: InferenceServicer(made).register}
        )
        http = HttpServer("127.0.0.1:0", made)
        addresses = {"grpc": await rpc.start(), "http": await http.start()}
        if api_processes:
            settings = InferenceSettings(deployment=MODEL, grpc="127.0.0.1:0", http="127.0.0.1:0")
            apis = ApiProcesses(settings, made, api_processes, (SERVICE_NAME,), inside, keyless=True)
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
    instant = Instant(float(sys.argv[1]) / 1e3)
    threading.Thread(
        target=lambda: [print(instant.report(), flush=True) for _ in sys.stdin], daemon=True
    ).start()
    asyncio.run(serve(instant, *map(int, sys.argv[2:])))
