"""Build a few adapters whose bytes never change, and keep their manifests."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.hostile.exhibit import ROOT, entry, header
from tests.support.adapters import ADAPTER_CONFIG, FEATURES, HIDDEN, INTERMEDIATE, LAYERS, key, write_base
from tests.support.folders import context_of, deployment_of, run_build

FOLDER = Path(__file__).parent
Shapes = dict[str, tuple[int, int]]


def _pairs(ranks: dict[str, int]) -> Shapes:
    made: Shapes = {}
    for layer in range(LAYERS):
        for module, rank in ranks.items():
            features_in, features_out = FEATURES[module]
            made[key(layer, module, "A")] = (rank, features_in)
            made[key(layer, module, "B")] = (features_out, rank)
    return made


_FUSED = f"{ROOT}layers.1.mlp.gate_up_proj.lora_"
ADAPTERS: dict[str, tuple[Shapes, dict[str, Any], dict[str, Any], str]] = {
    "activated": (_pairs({"q_proj": 4, "v_proj": 4}), {"alora_invocation_tokens": [5, 3]}, {}, "bfloat16"),
    "ragged": (
        _pairs({"q_proj": 3, "o_proj": 1, "down_proj": 7}),
        {"use_rslora": True, "rank_pattern": {"o_proj": 1, "down_proj": 7}, "target_modules": "all-linear",
         "alpha_pattern": {r"layers\.1\..*": 2.5}, "r": 3}, {}, "float32"),
    "fused": (
        {f"{_FUSED}A.weight": (2, HIDDEN), f"{_FUSED}B.weight": (2 * INTERMEDIATE, 2)},
        {"target_modules": ["gate_up_proj"], "r": 2},
        {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}, "float16"),
}  # fmt: skip
"""Adapters by name: shapes, changes to the adapter's config and to the base's, storage type."""


def manifest(name: str) -> bytes:
    """Build an adapter and return its manifest, with a line for every value so that a diff can be read."""
    shapes, config, base, dtype = ADAPTERS[name]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_base(folder / "base", **base)
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG | config, sort_keys=True))
        (folder / name / "adapter_model.safetensors").write_bytes(_tensors(shapes))
        required = deployment_of(folder, name, name="golden", lora_configuration={"dtype": dtype})
        found = json.loads(run_build(required, context_of(folder)).bundle(name).manifest.to_bytes())
    return (json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _tensors(shapes: Shapes) -> bytes:
    """A safetensors file in float16 whose values are eighths, so that every machine has the same."""
    entries, data = {}, b""
    for name, shape in shapes.items():
        entries[name] = entry(*shape, begin=len(data))
        values = (np.arange(shape[0] * shape[1]) * 7 % 31 - 15) / 8
        data += values.astype("<f2").tobytes()
    return header(entries, data)


if __name__ == "__main__":
    for name in ADAPTERS:
        (FOLDER / f"{name}.json").write_bytes(manifest(name))
