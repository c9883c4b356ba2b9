"""Tokens per second and time to first token through the gRPC door, with adapters and without, beside a peer.

Random adapters (rank 16 on all seven projections unless said otherwise) on the demo's base; prompts of 64
random words, 64 new tokens each, greedy, end-of-sequence ignored; 16, 16 and 48 requests at concurrency 1, 8
and 32. The peer in the same run is transformers + PEFT with a static mixed batch and no server; any
OpenAI-compatible URL can be another. Figures are medians over rounds; a table is printed last.

    python benchmarks/serving.py
    python benchmarks/serving.py --peer-url http://127.0.0.1:8000/v1 --peer-models base,lora1,lora2
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import save_file

from loramux import AsyncClient
from loramux.cli.tree import free_address
from loramux.records import Delta

ROOT = Path(__file__).resolve().parents[1]
BASE = Path.home() / ".cache/loramux/models/SmolLM2-135M-Instruct"
LOADS = ((1, 16), (8, 16), (32, 48))
"""Concurrency and requests."""
WORDS = 64
NEW_TOKENS = 64
MODULES = {
    "self_attn.q_proj": ("hidden", "q"),
    "self_attn.k_proj": ("hidden", "kv"),
    "self_attn.v_proj": ("hidden", "kv"),
    "self_attn.o_proj": ("q", "hidden"),
    "mlp.gate_proj": ("hidden", "inter"),
    "mlp.up_proj": ("hidden", "inter"),
    "mlp.down_proj": ("inter", "hidden"),
}


@dataclass(frozen=True)
class Figures:
    """One load on one server."""

    tokens_per_s: float
    first_token_s: float
    """Median."""


Ask = Callable[[str, str], Awaitable[tuple[int, float]]]
"""Model and prompt to tokens and seconds to the first one."""


def make_adapters(folder: Path, count: int, rank: int) -> list[str]:
    """Write random adapters in the layout of PEFT; every one changes what the base says."""
    config = json.loads((BASE / "config.json").read_text())
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    dim = hidden // heads
    sizes = {
        "hidden": hidden,
        "q": heads * dim,
        "kv": config["num_key_value_heads"] * dim,
        "inter": config["intermediate_size"],
    }
    names = [f"lora{index}" for index in range(count)]
    for seed, name in enumerate(names):
        draw = np.random.default_rng(seed)
        tensors = {}
        for layer in range(config["num_hidden_layers"]):
            for module, (inside, outside) in MODULES.items():
                key = f"base_model.model.model.layers.{layer}.{module}"
                a = draw.normal(size=(rank, sizes[inside])) / sizes[inside] ** 0.5
                b = draw.normal(size=(sizes[outside], rank)) * 0.02
                tensors[f"{key}.lora_A.weight"] = a.astype(ml_dtypes.bfloat16)
                tensors[f"{key}.lora_B.weight"] = b.astype(ml_dtypes.bfloat16)
        target = folder / name
        target.mkdir(parents=True)
        save_file(tensors, target / "adapter_model.safetensors")
        leaves = sorted(module.split(".")[1] for module in MODULES)
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank}
        settings |= {"target_modules": leaves, "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"}
        (target / "adapter_config.json").write_text(json.dumps(settings))
    return names


def prompts(count: int, seed: int) -> list[str]:
    """Distinct prompts, so that no prefix is met twice."""
    draw = random.Random(seed)
    syllables = "ba ke li mo nu pa re si to vu wa ye zi do fe gu ha jo ka le".split()
    return [
        " ".join(draw.choice(syllables) + draw.choice(syllables) for _ in range(WORDS)) for _ in range(count)
    ]


async def load(ask: Ask, models: Sequence[str], concurrency: int, requests: int, seed: int) -> Figures:
    """Keep concurrency requests open until all have ended."""
    gate = asyncio.Semaphore(concurrency)
    firsts: list[float] = []
    tokens = 0

    async def one(index: int, prompt: str) -> None:
        nonlocal tokens
        async with gate:
            count, first = await ask(models[index % len(models)], prompt)
        tokens += count
        firsts.append(first)

    started = time.perf_counter()
    await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts(requests, seed))))
    return Figures(tokens / (time.perf_counter() - started), statistics.median(firsts))


class Server:
    """The inference service as a process."""

    def __init__(self, work: Path, names: Sequence[str], flags: Sequence[str]) -> None:
        self.address = free_address("127.0.0.1:50052")
        store = f"file://{work}/store"
        build_deployment(work, names, store)
        command = [sys.executable, "-m", "inference_service", "--store", store, "--deployment", "bench"]
        command += ["--grpc", self.address, "--local-root", str(BASE), *flags]
        log = (work / f"server-{len(names)}.log").open("w")
        started = time.perf_counter()
        self._process = subprocess.Popen(command, stderr=log, cwd=ROOT)  # noqa: S603 - our own command
        health = [str(Path(sys.executable).parent / "loramux"), "health", self.address, "--wait", "120"]
        subprocess.run(health, check=True, capture_output=True)  # noqa: S603 - our own command
        self.start_s = time.perf_counter() - started

    async def ask(self, client: AsyncClient, model: str, prompt: str) -> tuple[int, float]:
        """One request."""
        started, first, tokens = time.perf_counter(), 0.0, 0
        async for event in client.generate(model, prompt, max_tokens=NEW_TOKENS, ignore_eos=True):
            if isinstance(event, Delta):
                first = first or time.perf_counter() - started
                tokens += len(event.token_ids)
        return tokens, first

    @property
    def rss_mb(self) -> float:
        """Resident memory."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1e3

    def stop(self) -> None:
        """End it as an operator does."""
        self._process.terminate()
        self._process.wait(30)


def build_deployment(work: Path, names: Sequence[str], store: str) -> None:
    """Build a deployment of these adapters through the builder service's own pipeline."""
    from builder_service.pipeline.build import build
    from builder_service.pipeline.progress import Progress
    from builder_service.pipeline.workshop import Workshop
    from shared.deployment import parse_deployment
    from shared.sources.open import open_sources
    from shared.storage.open import open_store

    adapters = {name: {"source": "LOCAL", "repo": str(work / "adapters" / name)} for name in names}
    data = {
        "model_name": "bench",
        "build": {
            "checkpoint_repository": {"source": "LOCAL", "repo": str(BASE)},
            "lora_adapters": adapters,
        },
        "runtime": {"served_model_name": "base"},
    }
    shop = Workshop(open_store(store), open_sources(local_roots=[work, BASE]))
    build(parse_deployment(data).deployment, shop, Progress(adapters))


async def measure(server: Server, models: Sequence[str], rounds: int) -> list[Figures]:
    """Every load, several rounds, medians."""
    async with AsyncClient(inference=server.address) as client:

        async def ask(model: str, prompt: str) -> tuple[int, float]:
            return await server.ask(client, model, prompt)

        await load(ask, models, 8, 16, seed=999)  # warm up
        return [await _median(ask, models, *each, rounds) for each in LOADS]


async def _median(ask: Ask, models: Sequence[str], concurrency: int, requests: int, rounds: int) -> Figures:
    runs = [await load(ask, models, concurrency, requests, seed) for seed in range(rounds)]
    return Figures(*(statistics.median(getattr(run, name) for run in runs) for name in Figures.__annotations__))


async def measure_url(url: str, models: Sequence[str], rounds: int) -> list[Figures]:
    """Any OpenAI-compatible server: streaming completions, one event a token."""
    import httpx

    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=64)) as client:

        async def ask(model: str, prompt: str) -> tuple[int, float]:
            body = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
            body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
            started, first, tokens = time.perf_counter(), 0.0, 0
            async with client.stream("POST", f"{url.rstrip('/')}/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        first = first or time.perf_counter() - started
                        usage = json.loads(line[6:]).get("usage") or {}
                        tokens = usage.get("completion_tokens", tokens)
            return tokens, first

        await load(ask, models, 8, 16, seed=999)
        return [await _median(ask, models, *each, rounds) for each in LOADS]


def measure_peft(work: Path, names: Sequence[str], *, adapters: bool) -> list[float]:
    """Tokens per second of transformers + PEFT, in a process of its own."""
    command = [sys.executable, str(ROOT / "benchmarks/peer_peft.py"), str(BASE), str(work / "adapters")]
    asked = [[concurrency, prompts(concurrency, seed=0)] for concurrency, _ in LOADS]
    given = json.dumps({"names": list(names) if adapters else [], "loads": asked, "new": NEW_TOKENS})
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)  # noqa: S603
    return [float(value) for value in json.loads(done.stdout.splitlines()[-1])]


def bandwidth_gb_s() -> float:
    """What one pass over a large array reaches, best of ten: the roof of decoding."""
    data = torch.ones(256 * 2**20 // 4)
    best = 0.0
    for _ in range(10):
        started = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - started) / 1e9)
    return best


def main() -> None:
    """Measure, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=8, help="adapters that requests use in turn")
    parser.add_argument("--loaded", type=int, help="adapters that are loaded; default: as many as are used")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peft", action="store_true", help="leave transformers + PEFT out")
    parser.add_argument("--peer-url", help="an OpenAI-compatible server, for example http://127.0.0.1:8000/v1")
    parser.add_argument("--peer-models", help="its models, separated by commas")
    parser.add_argument("--flags", default="", help="more flags for the inference service")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as folder:
        print(report(options, Path(folder)))


def report(options: argparse.Namespace, work: Path) -> str:
    """Run everything and return the table."""
    prepare = [sys.executable, str(ROOT / "examples/prepare_base.py"), str(BASE)]
    subprocess.run(prepare, check=True, capture_output=True)  # noqa: S603 - our own script
    names = make_adapters(work / "adapters", options.loaded or options.adapters, options.rank)
    used = names[: options.adapters]
    rows: list[tuple[str, list[Figures]]] = []
    server = Server(work, names, options.flags.split())
    try:
        rows.append((f"loramux, {len(used)} adapters", asyncio.run(measure(server, used, options.rounds))))
        rows.append(("loramux, base requests", asyncio.run(measure(server, ["base"], options.rounds))))
        rss = server.rss_mb
    finally:
        server.stop()
    bare = Server(work, [], options.flags.split())
    try:
        alone = asyncio.run(measure(bare, ["base"], options.rounds))
        rows.append(("loramux, no adapters loaded", alone))
        bare_rss = bare.rss_mb
    finally:
        bare.stop()
    if options.peer_url:
        models = options.peer_models.split(",")
        rows.append((options.peer_url, asyncio.run(measure_url(options.peer_url, models, options.rounds))))
    if not options.no_peft:
        for adapters in (True, False):
            label = f"transformers + PEFT, {len(used) if adapters else 'no'} adapters"
            speeds = measure_peft(work, used, adapters=adapters)
            rows.append((label, [Figures(speed, float("nan")) for speed in speeds]))
    return "\n".join([*_machine(), "", *_table(rows), "", *_notes(rows, server, rss, bare_rss, len(names))])


def _machine() -> list[str]:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "unknown",
    )
    versions = f"torch {torch.__version__.split('+')[0]}, Python {sys.version.split()[0]}"
    return [f"{model}, {os.cpu_count()} cores; {versions}; load average {os.getloadavg()[0]:.1f}"]


def _table(rows: Sequence[tuple[str, list[Figures]]]) -> list[str]:
    head = "".join(f" {f'tok/s @{c}':>11} {f'ttft @{c}':>10}" for c, _ in LOADS)
    lines = [f"{'':<34}{head}"]
    for label, figures in rows:
        cells = "".join(
            f" {f.tokens_per_s:>11.0f} {'-' if f.first_token_s != f.first_token_s else f'{f.first_token_s * 1e3:.0f} ms':>10}"
            for f in figures
        )
        lines.append(f"{label:<34}{cells}")
    return lines


def _notes(
    rows: Sequence[tuple[str, list[Figures]]], server: Server, rss: float, bare_rss: float, loaded: int
) -> list[str]:
    def ratio(over: int, under: int) -> str:
        pairs = zip(rows[over][1], rows[under][1], strict=True)
        return " / ".join(f"{a.tokens_per_s / b.tokens_per_s:.2f}" for a, b in pairs)

    weights = sum(path.stat().st_size for path in BASE.glob("*.safetensors"))
    roof = bandwidth_gb_s()
    lines = [
        f"with adapters / base requests, same server:  {ratio(0, 1)}",
        f"base requests / no adapters loaded:          {ratio(1, 2)}",
    ]
    if rows[-1][0].startswith("transformers"):
        lines.append(f"with adapters / transformers + PEFT:         {ratio(0, len(rows) - 2)}")
    lines += [
        f"start to SERVING with {loaded} adapters: {server.start_s:.1f} s, imports included",
        f"resident memory: {rss:.0f} MB with {loaded} adapters, {bare_rss:.0f} MB without",
        f"roof of a step: {weights / 1e6:.0f} MB of weights at {roof:.1f} GB/s = {weights / roof / 1e6:.1f} ms, "
        f"{1e9 * roof / weights:.0f} tokens/s per sequence",
    ]
    return lines


if __name__ == "__main__":
    main()
