"""Changes of a deployment: an adapter added or pushed to one of 1 and to one of many, beside a build of all.

    python benchmarks/changes.py [--many N] [--runs N] [--folder DIR]

The added adapter has the sizes of rank 16 on all seven modules of SmolLM2-135M (9.8 MB); the others are small,
for what they cost a change is what a generation says of them. The builder is a server in this process, with a
store in a folder; "seconds" is what a client waits, from its call to the published generation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from builder_service.builds.builds import Builds
from builder_service.pipeline.check import Checks
from builder_service.pipeline.context import BuildContext
from builder_service.rpc.servicer import SERVICE_NAME, BuilderServicer
from loramux.client import AsyncClient
from loramux.records import DeploymentState
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.deployment import Deployment, Repository, SourceKind
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.rpc.server import RpcServer
from loramux_shared.sources.base import Progress, Resolved, Source, unwatched
from loramux_shared.sources.local import LocalSource
from loramux_shared.sources.open import Sources
from loramux_shared.sources.pushed import PushedSource
from loramux_shared.storage.local import LocalStore

LAYERS, HIDDEN, INTERMEDIATE, KV = 30, 576, 1536, 192
BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": LAYERS,
    "vocab_size": 49152,
    "torch_dtype": "bfloat16",
}
FEATURES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KV),
    "self_attn.v_proj": (HIDDEN, KV),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}


def write_adapter(folder: Path, seed: int, rank: int, modules: Iterable[str]) -> Path:
    """Write a random adapter in bfloat16."""
    random, tensors = np.random.default_rng(seed), {}
    for layer in range(LAYERS if rank > 1 else 1):
        for module in modules:
            width, height = FEATURES[module]
            for side, shape in (("A", (rank, width)), ("B", (height, rank))):
                values = random.standard_normal(shape, np.float32) * np.float32(0.02)
                name = f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight"
                tensors[name] = values.astype(ml_dtypes.bfloat16)
    targets = [module.partition(".")[2] for module in modules]
    config = {
        "base_model_name_or_path": "base",
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": targets,
    }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def write_base(folder: Path) -> None:
    """Write a base without weights worth the name."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(BASE))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"model.embed_tokens.weight": np.zeros((32, 8), np.float32)}, folder / "model.safetensors")


class CountingSource(LocalSource):
    """Counts the bytes that are fetched."""

    fetched = 0

    def fetch(
        self, resolved: Resolved, names: Iterable[str], into: Path, progress: Progress = unwatched
    ) -> dict[str, FileDigest]:
        """Fetch, and count."""
        files = super().fetch(resolved, names, into, progress)
        self.fetched += sum(file.size for file in files.values())
        return files


class CountingStore(LocalStore):
    """Counts bytes and operations."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.counts = Counter[str]()

    def get(self, key: str, bound: int | None = None) -> bytes:
        """Read, and count."""
        data = super().get(key, bound)
        self.counts.update(read=len(data), operations=1)
        return data

    def put(self, key: str, data: bytes | Path) -> None:
        """Write, and count."""
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        self.counts.update({self._kind(key): size, "operations": 1})
        super().put(key, data)

    def take(self, key: str, file: Path) -> None:
        """Move, and count."""
        self.counts.update({self._kind(key): file.stat().st_size, "operations": 1})
        super().take(key, file)

    def list(self, prefix: str) -> Iterator[str]:
        """List, and count."""
        self.counts.update(operations=1)
        return super().list(prefix)

    @staticmethod
    def _kind(key: str) -> str:
        return "bundles written" if key.startswith("bundles/") else "records written"


class Bench:
    """A builder with a deployment of so many adapters."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        write_base(folder / "base")
        for number in range(count):
            write_adapter(folder / f"a{number:05d}", number, 1, ["self_attn.q_proj"])
        self.store, self.source = CountingStore(folder / "store"), CountingSource([folder])
        kinds: dict[SourceKind, Source] = {SourceKind.LOCAL: self.source, SourceKind.PUSHED: PushedSource()}
        self.builds = Builds(BuildContext(self.store, Sources(kinds, folder / "work"), folder / "work"))

    def deployment(self) -> Deployment:
        """The deployment of the small adapters."""
        local = {f"a{i:05d}": self.repository(f"a{i:05d}").model_dump() for i in range(self.count)}
        made = {"checkpoint_repository": self.repository("base").model_dump(), "lora_adapters": local}
        return parse_deployment({"model_name": "d", "build": made}).deployment

    def repository(self, name: str) -> Repository:
        """A folder."""
        return Repository(source=SourceKind.LOCAL, repo=str(self.folder / name))

    async def measure(self, runs: int) -> dict[str, list[dict[str, float]]]:
        """Build all, then add and push adapters, then build all again."""
        server = RpcServer(
            "127.0.0.1:0", {SERVICE_NAME: BuilderServicer(self.builds, Checks(self._context)).register}
        )
        found: dict[str, list[dict[str, float]]] = {}
        async with AsyncClient(builder=await server.start()) as client:
            found["build"] = [await self._timed(self._build(client))]
            for run in range(runs):
                folder = write_adapter(self.folder / f"new{run}", 10_000 + run, 16, FEATURES)
                added, pushed = {"new": self.repository(folder.name)}, self.folder / f"push{run}"
                found.setdefault("add", []).append(await self._timed(self._add(client, added)))
                write_adapter(pushed, 20_000 + run, 16, FEATURES)
                push = client.push("d", "pushed", pushed)
                found.setdefault("push", []).append(await self._timed(push))
            found["build again"] = [await self._timed(self._build(client))]
        await self.builds.drain(5)
        await server.drain(5)
        return found

    @property
    def _context(self) -> BuildContext:
        return self.builds._context

    async def _timed(self, work: Any) -> dict[str, float]:
        os.sync()
        self.store.counts.clear()
        self.source.fetched = 0
        begin = time.perf_counter()
        await work
        return {"seconds": time.perf_counter() - begin, "fetched": self.source.fetched, **self.store.counts}

    async def _build(self, client: AsyncClient) -> None:
        await client.build(self.deployment())
        await self._ended(client)

    async def _add(self, client: AsyncClient, adapters: dict[str, Repository]) -> None:
        await client.update("d", adapters)
        await self._ended(client)

    async def _ended(self, client: AsyncClient) -> None:
        *_, last = [info async for info in client.watch("d")]
        if last.state is not DeploymentState.ACTIVE:
            raise last.failure or RuntimeError(last.state)


def show(count: int, found: dict[str, list[dict[str, float]]]) -> None:
    """Print medians."""
    for what, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        columns = ("fetched", "bundles written", "records written", "read")
        megabytes = [statistics.median(run.get(name, 0) for run in runs) / 1e6 for name in columns]
        cells = "".join(f"{value:10.2f}" for value in megabytes)
        operations = statistics.median(run.get("operations", 0) for run in runs)
        print(
            f"{count:6d} {what:12} {statistics.median(seconds):8.3f} {min(seconds):7.3f} {max(seconds):7.3f}"
            f"{cells} {operations:6.0f}"
        )


def main() -> None:
    """Measure, and print the table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--many", type=int, default=500)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="scratch space; a temporary folder when not given")
    given = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("adapters what        seconds     min     max  MB: fetched   bundles   records      read    ops")
    for count in (1, given.many):
        with tempfile.TemporaryDirectory(prefix="loramux-benchmark-", dir=given.folder) as name:
            show(count, asyncio.run(Bench(Path(name), count).measure(given.runs)))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
