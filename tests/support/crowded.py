"""``python -m tests.support.crowded LIMIT``: both doors, which may open few files; prints their addresses."""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import tempfile
from pathlib import Path

from loramux_shared.descriptors import raise_limit
from loramux_shared.telemetry import log_to_stderr
from tests.support.endless import Endless, doors_of


async def main(limit: int) -> None:
    """Serve until killed."""
    log_to_stderr("json")
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit // 2, limit))
    raise_limit()
    with tempfile.TemporaryDirectory() as folder:
        http, rpc = doors_of(Endless(Path(folder)))
        addresses = {"http": await http.start(), "grpc": await rpc.start()}
        await rpc.set_serving(True)
        print(json.dumps(addresses), flush=True)  # noqa: T201 - what the test waits for
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
