"""The builder against a plain copy: 16 adapters of 20 MB, converted and published, to a folder and to S3.

    python benchmarks/builder.py [--adapters N] [--runs N] [--folder DIR]

Every measured run is a process of its own on an empty store. "copy" puts the adapters' files into the same
store, one after the other; "copy bundles" does so with as many bytes as the bundles have, padding included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from builder_service.pipeline.build import build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress
from loramux_shared.deployment import Deployment
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.open import open_store
from tests.support.s3_gateway import s3_gateway

# The sizes of a base of 1.5 billion parameters: rank 8 of all modules is 18.5 MB, the bundle 32.9 MB.
BASE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "num_hidden_layers": 28,
    "vocab_size": 32,
    "torch_dtype": "bfloat16",
}
FEATURES = {
    "self_attn.q_proj": (1536, 1536),
    "self_attn.k_proj": (1536, 256),
    "self_attn.v_proj": (1536, 256),
    "self_attn.o_proj": (1536, 1536),
    "mlp.gate_proj": (1536, 8960),
    "mlp.up_proj": (1536, 8960),
    "mlp.down_proj": (8960, 1536),
}
RANK, ALPHA = 8, 12
BLAS = {"OPENBLAS_NUM_THREADS": "1"}  # as the service has it


def make_inputs(folder: Path, count: int) -> None:
    """Write a base without weights worth the name, and random adapters in bfloat16."""
    base = folder / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(BASE))
    (base / "tokenizer.json").write_text("{}")
    save_file({"model.embed_tokens.weight": np.zeros((32, 8), np.float32)}, base / "model.safetensors")
    config = {
        "base_model_name_or_path": "base",
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": [name.partition(".")[2] for name in FEATURES],
    }
    for number in range(count):
        random = np.random.default_rng(number)
        tensors = {}
        for layer in range(BASE["num_hidden_layers"]):
            for module, (width, height) in FEATURES.items():
                name = f"base_model.model.model.layers.{layer}.{module}"
                for side, shape in (("A", (RANK, width)), ("B", (height, RANK))):
                    values = random.standard_normal(shape, np.float32) * np.float32(0.02)
                    tensors[f"{name}.lora_{side}.weight"] = values.astype(ml_dtypes.bfloat16)
        adapter = folder / f"adapter-{number:02d}"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, adapter / "adapter_model.safetensors")


def deployment(folder: Path) -> Deployment:
    """Return the deployment of all adapters below a folder."""
    local = {path.name: {"source": "LOCAL", "repo": str(path)} for path in sorted(folder.glob("adapter-*"))}
    base = {"source": "LOCAL", "repo": str(folder / "base")}
    data = {"model_name": "benchmark", "build": {"checkpoint_repository": base, "lora_adapters": local}}
    return parse_deployment(data).deployment


def run_copy(folder: Path, uri: str, work: Path) -> int:
    """Put the adapters' files into the store as they are."""
    del work
    store, size = open_store(uri), 0
    for path in sorted(folder.glob("adapter-*/*")):
        store.put(f"copy/{path.parent.name}/{path.name}", path)
        size += path.stat().st_size
    return size


def run_copy_bundles(folder: Path, uri: str, work: Path) -> int:
    """Put files of the bundles' sizes into the store."""
    rows = int(BASE["num_hidden_layers"]) * len(FEATURES)
    size = 128 + 2 * rows * max(RANK * sum(shape) for shape in FEATURES.values())
    store, file = open_store(uri), work / "bundle"
    file.write_bytes(np.random.default_rng(0).bytes(size))
    names = [path.name for path in sorted(folder.glob("adapter-*"))]
    begin = time.perf_counter()
    for name in names:
        store.put(f"copy/{name}", file)
    run_copy_bundles.took = time.perf_counter() - begin  # type: ignore[attr-defined]
    return size * len(names)


def run_build(folder: Path, uri: str, work: Path, *, verify: bool = False) -> int:
    """Build and publish the deployment."""
    required = deployment(folder)
    context = BuildContext(store=open_store(uri), sources=open_sources(local_roots=[folder]), work_dir=work)
    progress = Progress(required.build.lora_adapters)
    build(required, context, progress, verify=verify)
    return sum(adapter.bundle_bytes for adapter in progress.adapters)


def run_build_again(folder: Path, uri: str, work: Path) -> int:
    """Build what the store holds already, with verify: nothing is made, and what is stored is read back."""
    run_build(folder, uri, work)
    begin = time.perf_counter()
    size = run_build(folder, uri, work, verify=True)
    run_build_again.took = time.perf_counter() - begin  # type: ignore[attr-defined]
    return size


RUNS: dict[str, Callable[[Path, str, Path], int]] = {
    "copy": run_copy,
    "copy bundles": run_copy_bundles,
    "build": run_build,
    "build again": run_build_again,
}


def child(what: str, folder: Path, uri: str, work: Path) -> None:
    """Do one run in this process, and print what it took."""
    os.sync()
    begin = time.perf_counter()
    size = RUNS[what](folder, uri, work)
    took = getattr(RUNS[what], "took", time.perf_counter() - begin)
    # ru_maxrss would be that of the process that started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024
    print(json.dumps({"seconds": took, "bytes": size, "peak_rss": peak}))


def measure(what: str, folder: Path, uri: str, work: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Do one run in a process of its own."""
    work.mkdir()
    command = [
        sys.executable,
        __file__,
        "--child",
        what,
        "--folder",
        str(folder),
        "--uri",
        uri,
        "--work",
        str(work),
    ]
    done = subprocess.run(  # noqa: S603 - this file
        command, env=os.environ | BLAS | environment, check=True, stdout=subprocess.PIPE, text=True
    )
    shutil.rmtree(work)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


@contextmanager
def stores(scratch: Path) -> Iterator[dict[str, tuple[Callable[[], str], dict[str, str]]]]:
    """Yield per kind of store a maker of empty ones, and the environment that reaches them."""
    with s3_gateway() as server:

        def folder() -> str:
            shutil.rmtree(scratch / "store", ignore_errors=True)
            return f"file://{scratch}/store"

        yield {
            "file": (folder, {}),
            "s3": (lambda: f"s3://{server.new_bucket()}", server.environment),
        }


def main() -> None:
    """Measure, and print the table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="scratch space; a temporary folder when not given")
    parser.add_argument("--child", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--uri", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    provided = parser.parse_args()
    if provided.child:
        child(provided.child, provided.folder, provided.uri, provided.work)
        return
    with tempfile.TemporaryDirectory(prefix="loramux-benchmark-", dir=provided.folder) as name:
        scratch = Path(name)
        make_inputs(scratch / "inputs", provided.adapters)
        measured: dict[tuple[str, str], list[dict[str, Any]]] = {}
        with stores(scratch) as kinds:
            for run in range(provided.runs):
                for kind, (make, environment) in kinds.items():
                    for what in RUNS:  # side by side, so that a busy moment of the machine hits all of them
                        one = measure(what, scratch / "inputs", make(), scratch / "work", environment)
                        measured.setdefault((kind, what), []).append(one)
                        print(f"run {run + 1}: {kind} {what}: {one['seconds']:.2f} s", file=sys.stderr)
    show(measured)


def show(measured: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """Print medians, and each against both copies in the same store."""
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}")
    print(
        f"{'store':6} {'run':14} {'median s':>9} {'min':>6} {'max':>6} {'MB':>6} "
        f"{'x copy':>7} {'x bundles':>9} {'RSS MB':>7}"
    )
    for (kind, what), runs in measured.items():
        seconds = [run["seconds"] for run in runs]
        peak = max(run["peak_rss"] for run in runs) / 1e6
        copy, bundles = (_times(runs, measured[kind, name]) for name in ("copy", "copy bundles"))
        print(
            f"{kind:6} {what:14} {statistics.median(seconds):9.2f} {min(seconds):6.2f} {max(seconds):6.2f} "
            f"{runs[0]['bytes'] / 1e6:6.0f} {copy:7.2f} {bundles:9.2f} {peak:7.0f}"
        )


def _times(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
    """Return the median of how many times as long as others runs took, pair by pair."""
    return statistics.median(float(a["seconds"] / b["seconds"]) for a, b in zip(runs, others, strict=True))


if __name__ == "__main__":
    main()
