"""The inference service as a process with both APIs."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.processes.forks import Forked, inference_service
from tests.support.processes.watching import await_line, kill_at_end
from tests.support.tiny import World


def flags_of(world: World, *flags: str) -> list[str]:
    """Flags of the service for a world that was built into its folder."""
    store = f"file://{world.root}/store"
    return ["--deployment", "tiny", *flags, "--store", store, "--local-root", str(world.root)]


@contextmanager
def run_inference(
    world: World, folder: Path, before: Callable[[], None] | None = None, **settings: str
) -> Iterator[tuple[Forked, dict[str, Any]]]:
    """Run the service, after a function of a module if given; yields it and its start line."""
    flags = flags_of(world, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--threads", "1")
    environment = {**os.environ, "LORAMUX_KV_MEMORY_GB": "0.01", "LORAMUX_DTYPE": "float32"} | settings
    log = folder / "log"
    log.write_text("")
    with kill_at_end(inference_service(flags, log, environment, before)) as process:
        yield process, json.loads(await_line(process, log, "service ready"))
