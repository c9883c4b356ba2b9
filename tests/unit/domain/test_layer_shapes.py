"""Adapters of a base whose layers differ."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from builder_service.domain.rules.adapter import Rulebook, check_adapter
from builder_service.domain.rules.tensors import AdapterLimits
from loramux_shared.bases.read import read_fields
from loramux_shared.deployment import Dtype
from tests.support.adapters import BASE_CONFIG, HIDDEN, write_adapter
from tests.support.cases import cases

BASE: dict[str, Any] = BASE_CONFIG | {
    "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "attention_k_eq_v": True,
    "global_head_dim": 8, "head_dim": 4, "hidden_size_per_layer_input": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "num_global_key_value_heads": 1,
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
}  # fmt: skip
"""Four heads: of 4 dimensions in layers 0 and 2, of 8 in layers 1 and 3; the last two read the others' keys."""
GOOD = cases(__file__, "GOOD")
OF_LAYER_1 = "q_proj, k_proj, o_proj, gate_proj, up_proj, down_proj, per_layer_input_gate, per_layer_projection"


def _findings(folder: Path, modules: dict[str, tuple[int, int]]) -> list[tuple[str, str, str]]:
    """Return the refusals of an adapter of these modules: code, expected and found value."""
    made: dict[str, Any] = {}
    for name, (inside, out) in modules.items():
        for side, shape in {"A": (4, inside), "B": (out, 4)}.items():
            made[f"base_model.model.model.{name}.lora_{side}.weight"] = np.ones(shape, ml_dtypes.bfloat16)
    targets = sorted({name.rpartition(".")[2] for name in modules})
    rules = Rulebook(AdapterLimits(read_fields(BASE), 64, frozenset()), ("Gemma4ForCausalLM",), Dtype.BFLOAT16)
    checked = check_adapter(write_adapter(folder, made, target_modules=targets), rules)
    return [(finding.code, finding.expected, finding.found) for finding in checked.errors]


def test_modules_have_the_shapes_of_their_layers(tmp_path: Path) -> None:
    """Wider heads, wider MLPs, layers without keys or values, inputs of layers."""
    assert _findings(tmp_path, GOOD) == []


@pytest.mark.parametrize(
    ("module", "shape", "code", "expected", "found"),
    [
        ("layers.1.self_attn.v_proj", (HIDDEN, 8), "E_MODULE", OF_LAYER_1, "v_proj"),
        ("layers.2.self_attn.k_proj", (HIDDEN, 8), "E_MODULE", OF_LAYER_1.replace("k_proj, ", ""), "k_proj"),
        ("layers.1.self_attn.q_proj", (HIDDEN, 16), "E_DIMS", "in=16 out=32", "in=16 out=16"),
        ("layers.0.mlp.up_proj", (HIDDEN, 48), "E_DIMS", "in=16 out=24", "in=16 out=48"),
        ("per_layer_model_projection", (HIDDEN, 24), "E_MODULE", "lora_A", "per_layer_model_projection"),
    ],
)
def test_what_a_layer_does_not_have_is_refused_by_name(
    tmp_path: Path, module: str, shape: tuple[int, int], code: str, expected: str, found: str
) -> None:
    """The refusal has the modules of the layer, or their shapes."""
    [refusal] = dict.fromkeys(_findings(tmp_path, {module: shape}))
    assert (refusal[0], refusal[2]) == (code, found)
    assert expected in refusal[1]
