"""Kinds of adapters beside plain LoRA of the same rank: seconds of a step, in turns in one run.

The engine alone, with the demo's base and eight adapters of each kind, on all seven modules: a step that reads
eight prompts of 64 tokens, and steps that decode eight streams, each with an adapter of its own or all of one.
Figures are medians of rounds; ratios are medians of those of neighbours. The exit status is 1 where a step that
decodes takes more than 5 % beyond plain LoRA's.

    python -m benchmarks.kinds --rounds 15

A kind is an entry of `KINDS`: it changes tensors and config of an adapter as PEFT writes them.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog
from safetensors.numpy import load_file, save_file

from benchmarks.serving import BASE, ROOT, build_deployment, make_adapters
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence
from inference_service.startup.load import Ready, load
from loramux_shared.settings import InferenceSettings
from loramux_shared.storage.open import open_store

Tensors = MutableMapping[str, np.ndarray[Any, Any]]
COUNT: Final = 8
"""Adapters of a kind, and streams."""
RANK: Final = 16
PROMPT: Final = 64
NEW: Final = 32
MOST: Final = 1.05
"""Of plain LoRA's step."""
PLAIN: Final = "LoRA"
_ROOT: Final = "base_model.model."


def _plain(tensors: Tensors, base: Tensors) -> Mapping[str, Any]:
    del tensors, base
    return {}


def _dora(tensors: Tensors, base: Tensors) -> Mapping[str, Any]:
    """Magnitudes a few percent off the norms of the base's rows."""
    draw = np.random.default_rng(len(tensors))
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        norms = np.linalg.norm(base[f"{module.removeprefix(_ROOT)}.weight"].astype(np.float32), axis=1)
        off = draw.normal(1.0, 0.03, len(norms))
        tensors[f"{module}.lora_magnitude_vector"] = (norms * off).astype(np.float32)
    return {"use_dora": True}


def _biases(tensors: Tensors, base: Tensors) -> Mapping[str, Any]:
    """Biases of lora_B: the demo's base has none of its own."""
    del base
    draw = np.random.default_rng(len(tensors))
    for name in [name for name in tensors if name.endswith(".lora_B.weight")]:
        tensors[name.replace(".weight", ".bias")] = draw.normal(0, 0.02, len(tensors[name])).astype(np.float32)
    return {"lora_bias": True}


KINDS: Final[Mapping[str, Callable[[Tensors, Tensors], Mapping[str, Any]]]] = {
    PLAIN: _plain,
    "DoRA": _dora,
    "biases": _biases,
}
"""By name: changes tensors in place, those of the base beside them, and returns what the config says."""


def make(work: Path) -> dict[str, list[str]]:
    """Write the adapters of every kind; returns their names by kind."""
    base, folder, found = load_file(BASE / "model.safetensors"), work / "adapters", {}
    folder.mkdir()
    for kind, change in KINDS.items():
        names = []
        for name in make_adapters(work / kind, COUNT, RANK):
            own = folder / f"{kind}-{name}"
            (work / kind / name).rename(own)
            tensors = load_file(own / "adapter_model.safetensors")
            config = json.loads((own / "adapter_config.json").read_text()) | change(tensors, base)
            save_file(tensors, own / "adapter_model.safetensors")
            (own / "adapter_config.json").write_text(json.dumps(config))
            names.append(own.name)
        found[kind] = names
    return found


@dataclass(frozen=True)
class Steps:
    """Seconds of one run of eight streams."""

    prompts: float
    """Of the step that reads the prompts."""
    decode: float
    """Of a step that decodes: the median."""


def run(ready: Ready, names: list[str], seed: int) -> Steps:
    """Read prompts and decode, with as many adapters as there are names."""
    engine, draw = ready.engine._engine, random.Random(seed)
    params = SamplingParams(max_tokens=NEW)
    for number in range(COUNT):
        adapter = ready.service.catalog.get(names[number % len(names)]).adapter
        prompt = [draw.randrange(1000, 40000) for _ in range(PROMPT)]
        engine.add(Sequence(str(number), prompt, params, adapter))
    times = []
    while not engine.idle:
        began = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - began)
    return Steps(times[0], statistics.median(times[2:-2]))


def measure(ready: Ready, kinds: Mapping[str, list[str]], rounds: int) -> bool:
    """Let all kinds take turns, print the table, and return whether all are within the bar."""
    found: dict[tuple[str, int], list[Steps]] = {}
    for turn in range(rounds + 1):
        for adapters in (1, COUNT):
            for kind, names in kinds.items():
                steps = run(ready, names[:adapters], turn)
                if turn:  # the first is to warm up
                    found.setdefault((kind, adapters), []).append(steps)
    within = True
    print(f"{'':<10}{'adapters':>9}{'decode, ms':>12}{'to LoRA':>9}{'prompts, ms':>13}{'to LoRA':>9}")
    for (kind, adapters), own in found.items():
        plain = found[PLAIN, adapters]
        pairs = list(zip(own, plain, strict=True))
        decode = statistics.median(each.decode / other.decode for each, other in pairs)
        prompts = statistics.median(each.prompts / other.prompts for each, other in pairs)
        within &= decode <= MOST
        times = [
            1e3 * statistics.median(each) for each in zip(*((s.decode, s.prompts) for s in own), strict=True)
        ]
        print(f"{kind:<10}{adapters:>9}{times[0]:>12.2f}{decode:>9.3f}{times[1]:>13.2f}{prompts:>9.3f}")
    return within


def main() -> int:
    """Measure, print the table, and tell by the status whether the bar was met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    prepare = [sys.executable, str(ROOT / "examples/prepare_base.py"), str(BASE)]
    subprocess.run(prepare, check=True, capture_output=True)  # noqa: S603 - our own script
    with tempfile.TemporaryDirectory(prefix="loramux-kinds-") as folder:
        work = Path(folder)
        kinds = make(work)
        uri = f"file://{work}/store"
        build_deployment(work, [name for names in kinds.values() for name in names], uri)
        settings = InferenceSettings(
            deployment="bench",
            dtype=options.dtype,
            local_roots=(work, BASE),
            kv_memory_gb=0.3,
            adapter_memory_gb=1.0,
            adapter_disk_gb=0,
            preload=COUNT * len(kinds),
        )
        ready = load(settings, open_store(uri))
        return 0 if measure(ready, kinds, options.rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
