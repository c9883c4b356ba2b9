"""The builder against a plain copy: 16 adapters of 20 MB, converted and published, to a folder and to S3.

    python -m benchmarks.builder

Every measured run is a process of its own on an empty store. "copy" puts the adapters' files into the same
store, one after the other; "copy bundles" does so with as many bytes as the bundles have, padding included.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.numpy import save_file

from benchmarks.figures import machine, ratio
from benchmarks.on_gpu import checkpoint
from loramux_shared.storage.open import open_store
from tests.support.s3_gateway import s3_gateway

# The sizes of a base of 1.5 billion parameters: rank 8 of all modules is 18.5 MB, the bundle 32.9 MB.
BASE: Final[dict[str, Any]] = (
    {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16"}
    | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 32}
    | {"num_attention_heads": 12, "num_key_value_heads": 2}
)
RANK: Final = 8
BUNDLE_BYTES: Final = 128 + 2 * RANK * 28 * 7 * (1536 + 8960)
"""Every matrix pair is padded to the largest one."""
NAMES: Final = [f"adapter-{number:02d}" for number in range(16)]


def make_inputs(work: Path) -> None:
    """Write a base without weights worth the name, and random adapters in bfloat16."""
    base = work / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(BASE))
    (base / "tokenizer.json").write_text("{}")
    save_file({"model.embed_tokens.weight": np.zeros((32, 8), np.float32)}, base / "model.safetensors")
    for name in NAMES:
        checkpoint.write_adapter(work / "adapters" / name, BASE, RANK, torch.device("cpu"))


def copy(work: Path, uri: str) -> None:
    """Put the adapters' files into the store as they are."""
    for path in sorted((work / "adapters").glob("*/*")):
        open_store(uri).put(f"copy/{path.parent.name}/{path.name}", path)


def copy_bundles(work: Path, uri: str) -> None:
    """Put files of the bundles' sizes into the store."""
    for name in NAMES:
        open_store(uri).put(f"copy/{name}", work / "bundle")


def build(work: Path, uri: str) -> None:
    """Build and publish the deployment."""
    checkpoint.build_deployment(work, "benchmark", NAMES, 2048, store=uri)


RUNS: Final[Mapping[str, Callable[[Path, str], None]]] = {
    "copy": copy,
    "copy bundles": copy_bundles,
    "build": build,
}


def child(what: str, work: Path, uri: str) -> None:
    """Do one run in this process, and print the seconds that it took."""
    os.sync()
    began = time.perf_counter()
    RUNS[what](work, uri)
    print(time.perf_counter() - began)


def measure(what: str, work: Path, uri: str, environment: dict[str, str]) -> float:
    """Do one run in a process of its own, with one thread for numpy, as the service has it."""
    command = [sys.executable, "-m", "benchmarks.builder", "--child", what, str(work), uri]
    child = os.environ | {"OPENBLAS_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, env=child, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - this file
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, and print the table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]), options.child[2])
        return
    measured: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="loramux-benchmark-") as folder, s3_gateway() as server:
        work = Path(folder)
        make_inputs(work)
        (work / "bundle").write_bytes(np.random.default_rng(0).bytes(BUNDLE_BYTES))
        for run in range(options.runs):
            for kind in ("folder", "s3"):
                for what in RUNS:  # side by side, so that a busy moment of the machine hits all of them
                    shutil.rmtree(work / "store", ignore_errors=True)
                    uri = f"s3://{server.new_bucket()}" if kind == "s3" else f"file://{work}/store"
                    seconds = measure(what, work, uri, server.environment)
                    measured.setdefault((kind, what), []).append(seconds)
                    print(f"run {run + 1}: {kind} {what}: {seconds:.2f} s", file=sys.stderr)
    show(measured)


def show(measured: Mapping[tuple[str, str], list[float]]) -> None:
    """Print medians, and each against both copies in the same store."""
    print(machine())
    print(f"{'store':7} {'run':13} {'median s':>9} {'min':>6} {'max':>6} {'x copy':>7} {'x bundles':>9}")
    for (kind, what), seconds in measured.items():
        row = f"{kind:7} {what:13} {statistics.median(seconds):9.2f} {min(seconds):6.2f} {max(seconds):6.2f}"
        copies, bundles = (ratio(seconds, measured[kind, name]) for name in ("copy", "copy bundles"))
        print(f"{row} {copies:7.2f} {bundles:9.2f}")


if __name__ == "__main__":
    main()
