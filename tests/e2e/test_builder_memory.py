"""A builder's memory does not grow with its adapters: measured in a separate process."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.adapters import write_base
from tests.support.s3_gateway import S3Server
from tests.support.waiting import BOUND_S

HIDDEN, INTERMEDIATE, RANK, LAYERS = 16384, 131072, 64, 3
MODULES = {
    "gate_proj": (HIDDEN, INTERMEDIATE),
    "up_proj": (HIDDEN, INTERMEDIATE),
    "down_proj": (INTERMEDIATE, HIDDEN),
}
BLAS = {"OPENBLAS_NUM_THREADS": "1"}  # as the service has it
ROW_BYTES = 2 * RANK * (HIDDEN + INTERMEDIATE)
LIMIT_BYTES = 160 * 10**6 + 2 * ROW_BYTES

SCRIPT = """
import sys
from pathlib import Path
from builder_service.pipeline.build import build
from builder_service.pipeline.progress import Progress
from builder_service.pipeline.context import BuildContext
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.open import open_store
folder, names = Path(sys.argv[1]), sys.argv[3:]
base = {"source": "LOCAL", "repo": str(folder / "base")}
adapters = {name: {"source": "LOCAL", "repo": str(folder / name)} for name in names}
made = {"checkpoint_repository": base, "lora_adapters": adapters, "max_lora_rank": 64}
context = BuildContext(open_store(sys.argv[2]), open_sources(local_roots=[folder]), folder / "work")
progress = Progress(names)
build(parse_deployment({"model_name": "huge", "build": made}).deployment, context, progress)
print(sum(adapter.bundle_bytes for adapter in progress.adapters))
[line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
print(int(line.split()[1]) * 1024)  # ru_maxrss would be that of the process that started this one
"""


def write_large_adapter(folder: Path, layers: int, mark: int) -> int:
    """Write 57 MB per layer: a number, and else zeros that take no space here; returns the bytes."""
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(MODULES)}))
    entries, offset = {}, 0
    for layer in range(layers):
        for module, (features_in, features_out) in MODULES.items():
            for side, shape in (("A", [RANK, features_in]), ("B", [features_out, RANK])):
                name = f"base_model.model.model.layers.{layer}.mlp.{module}.lora_{side}.weight"
                end = offset + 2 * shape[0] * shape[1]
                entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
                offset = end
    header = json.dumps(entries).encode()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + struct.pack("<H", mark))
        file.truncate(8 + len(header) + offset)
    return offset


def peak_bytes(folder: Path, uri: str, names: list[str], environment: dict[str, str]) -> tuple[int, int]:
    """Build in a process of its own; return the bytes of the bundles and the peak memory."""
    command = [sys.executable, "-c", SCRIPT, str(folder), uri, *names]
    done = subprocess.run(
        command,
        env=os.environ | BLAS | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=BOUND_S,
    )
    size, peak = map(int, done.stdout.splitlines()[-2:])
    return size, peak


@pytest.mark.parametrize("kind", ["file", pytest.param("s3", marks=pytest.mark.sweep)])
def test_memory_does_not_grow_with_an_adapter(tmp_path, s3_server: S3Server, kind):
    """Two adapters at once, of 170 and 57 MB, take at most 160 MB and two of their rows of 19 MB each."""
    write_base(tmp_path / "base", hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS)
    total = write_large_adapter(tmp_path / "large", LAYERS if kind == "file" else 1, 0x3F80)
    total += write_large_adapter(tmp_path / "other", 1, 0x4000)
    uri = f"file://{tmp_path}/store" if kind == "file" else f"s3://{s3_server.new_bucket()}"
    size, peak = peak_bytes(tmp_path, uri, ["large", "other"], s3_server.environment)
    assert size > total
    assert peak <= LIMIT_BYTES, f"{peak / 1e6:.0f} MB"
