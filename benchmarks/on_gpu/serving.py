"""Serving of a random model of 8B's shape, beside vLLM and SGLang on the same card where they are installed.

A replica without adapters and one with all of them are asked in turn, over gRPC; then one of two ranks, where
there are two cards. The others have the same checkpoint and adapters, and are asked over HTTP, one after the
other. Prompts are of random words.
"""

import asyncio
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import torch

from benchmarks.on_gpu.checkpoint import build_deployment, write_adapter, write_base
from benchmarks.on_gpu.model import LLAMA_8B, TINY
from benchmarks.on_gpu.run import OF_BASE, Run
from benchmarks.service import Ask, end_process, over_grpc, over_http, replica_process
from benchmarks.serving import prompts, run_of
from loramux import AsyncClient
from loramux.cli.local.tree import free_address

RANK: Final = 16
KV_GB: Final = 8
"""Size of our caches on every card: two replicas share it."""
PEER_SHARE: Final = 0.6
"""Part of the card that a peer may take for weights and cache."""
LONGEST: Final = 512
ROUNDS: Final = 4
"""Requests for each that is open at once."""


@dataclass(frozen=True)
class Plan:
    """The requests."""

    shape: dict[str, Any]
    adapters: int
    actives: tuple[int, ...]
    """Adapters that requests take in turn; 0: requests for the base."""
    concurrencies: tuple[int, ...]


FULL: Final = Plan(LLAMA_8B | {"tie_word_embeddings": True}, 16, (0, 1, 8, 16), (1, 32, 128))
REHEARSAL: Final = Plan(TINY | {"max_position_embeddings": LONGEST}, 2, (0, 2), (2,))


def run(run: Run) -> None:
    """Write a base and adapters, build them, serve them with and without adapters, and ask."""
    plan = run.choose(FULL, REHEARSAL)
    with tempfile.TemporaryDirectory(prefix="loramux-gpu-") as folder:
        work = Path(folder)
        names = _prepare(run, plan, work)
        settings: dict[str, object] = {"native": False, "kv_memory_gb": run.choose(KV_GB, 0.1)}
        bases: dict[int, float] = {}
        # One after the other: they share the card, and each plans with what is free.
        with (
            replica_process(work, "bare", **settings) as bare,
            replica_process(work, "full", **settings) as full,
        ):
            asyncio.run(_ask_ours(run, plan, bare.grpc, full.grpc, names, bases))
        if run.device.rehearses or torch.cuda.device_count() < 2:
            run.note("two ranks: skipped: one card")
        else:
            with replica_process(work, "full", tensor_parallel=2, **settings) as two:
                asyncio.run(_ask_ranks(run, plan, two.grpc, names, bases))
        for peer, command in run.choose(peers(work, names), {}).items():
            try:
                with _serving(run, work, command) as url:
                    asyncio.run(_ask_peer(run, plan, peer, url, names, bases))
            except (RuntimeError, httpx.HTTPError) as error:
                run.note(f"{peer} was not measured: {error}")


def _prepare(run: Run, plan: Plan, work: Path) -> list[str]:
    """Return the names of the adapters of deployment ``full``; ``bare`` has none."""
    words = sorted({word for prompt in prompts(2000, 0) for word in prompt.split()})
    write_base(work / "base", plan.shape, run.device.where, words[: plan.shape["vocab_size"] - 3])
    (work / "base" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    names = [f"lora{index}" for index in range(plan.adapters)]
    for name in names:
        write_adapter(work / "adapters" / name, plan.shape, RANK, run.device.where)
    build_deployment(work, "full", names, LONGEST)
    build_deployment(work, "bare", [], LONGEST)
    return names


async def _ask_ours(
    run: Run, plan: Plan, bare: str, full: str, names: list[str], bases: dict[int, float]
) -> None:
    async with AsyncClient(inference=bare) as alone, AsyncClient(inference=full) as many:
        loads = [("loramux", over_grpc(alone), 0, ["base"])]
        loads += [
            ("loramux", over_grpc(many), len(names), names[:active] or ["base"]) for active in plan.actives
        ]
        await _ask_all(run, plan, loads, bases)


async def _ask_ranks(run: Run, plan: Plan, two: str, names: list[str], bases: dict[int, float]) -> None:
    async with AsyncClient(inference=two) as client:
        loads = [
            ("2 ranks", over_grpc(client), len(names), names[:active] or ["base"]) for active in plan.actives
        ]
        await _ask_all(run, plan, loads, bases)


async def _ask_peer(
    run: Run, plan: Plan, peer: str, url: str, names: list[str], bases: dict[int, float]
) -> None:
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=256)) as web:
        ask = over_http(web, url)
        loads = [(peer, ask, len(names), names[:active] or ["base"]) for active in plan.actives]
        await _ask_all(run, plan, loads, bases)


async def _ask_all(
    run: Run, plan: Plan, loads: Sequence[tuple[str, Ask, int, list[str]]], bases: dict[int, float]
) -> None:
    """Ask each in turn; rates are parts of that of our replica without adapters, which is the first."""
    hidden = math.nan if run.device.rehearses else 1.0
    for _, ask, _, models in loads:
        await run_of(ask, models)(max(plan.concurrencies), max(plan.concurrencies), 999)  # warm up
    for seed, concurrency in enumerate(plan.concurrencies):
        for server, ask, loaded, models in loads:
            if run.left_s <= 0:
                run.note(f"out of time before {server}, concurrency {concurrency}, {models}")
                return
            found = await run_of(ask, models)(concurrency, ROUNDS * concurrency, seed)
            base = bases.setdefault(concurrency, found.tokens_per_s)
            active = 0 if models == ["base"] else len(models)
            figures = {"tokens/s": found.tokens_per_s, "ttft p50 ms": found.first_token_s * 1e3}
            if server == "loramux":
                figures[OF_BASE] = found.tokens_per_s / base
            else:
                figures["of loramux's base"] = found.tokens_per_s / base
            point: dict[str, int | str] = {
                "server": server,
                "loaded": loaded,
                "active": active,
                "concurrency": concurrency,
            }
            run.add(point, {name: value * hidden for name, value in figures.items()})


def peers(work: Path, names: Sequence[str]) -> Mapping[str, list[str]]:
    """Return the commands of the peers that are installed, without their addresses."""
    paths = [f"{name}={work / 'adapters' / name}" for name in names]
    share, most = str(PEER_SHARE), str(len(names))
    same = ["--served-model-name", "base", "--enable-lora"]
    commands = {
        "vllm": [
            *("vllm.entrypoints.openai.api_server", "--model", str(work / "base"), *same),
            *("--max-model-len", str(LONGEST), "--gpu-memory-utilization", share),
            *("--max-loras", most, "--max-lora-rank", str(RANK), "--lora-modules", *paths),
        ],
        "sglang": [
            *("sglang.launch_server", "--model-path", str(work / "base"), *same),
            *("--context-length", str(LONGEST), "--mem-fraction-static", share),
            *("--max-loras-per-batch", most, "--lora-paths", *paths),
        ],
    }
    return {name: command for name, command in commands.items() if importlib.util.find_spec(name)}


@contextmanager
def _serving(run: Run, work: Path, command: list[str]) -> Iterator[str]:
    """Start a peer; its address, once it answers."""
    host, _, port = free_address().rpartition(":")
    log = work / f"{port}.log"
    with log.open("w") as output:
        whole = [sys.executable, "-m", *command, "--host", host, "--port", port]
        process = subprocess.Popen(whole, stdout=output, stderr=output)  # noqa: S603 - installed here
    try:
        asyncio.run(_until_ready(run, f"http://{host}:{port}/v1", process))
        yield f"http://{host}:{port}/v1"
    except RuntimeError as error:
        raise RuntimeError(f"{error}: {json.dumps(log.read_text()[-500:])}") from None
    finally:
        end_process(process)


async def _until_ready(run: Run, url: str, process: subprocess.Popen[bytes]) -> None:
    async with httpx.AsyncClient() as web:
        while process.poll() is None and run.left_s > 0:
            try:
                if (await web.get(f"{url}/models")).is_success:
                    return
            except httpx.TransportError:
                await asyncio.sleep(1)
    raise RuntimeError("it did not begin to serve")
