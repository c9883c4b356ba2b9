from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from loramux_shared.bundle.reader import Bundle
from loramux_shared.faults import AdapterInvalid
from tests.support import folders
from tests.support.adapters import BASE_CONFIG, HEADS, HIDDEN, KV_HEADS, write_adapter, write_base
from tests.support.cases import cases
from tests.support.folders import deployment_of

CONFIG = BASE_CONFIG | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "torch_dtype": "float32"}
HEAD_DIM = HIDDEN // HEADS
# The rows of the fused output that are each module's.
SLICES = cases(__file__, "SLICES")


def phi3_adapter(folder: Path, **config: Any) -> dict[str, np.ndarray]:
    """Save an adapter of a small Phi-3 with PEFT; returns PEFT's delta of every module."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in CONFIG.items() if name not in {"torch_dtype", "architectures"}}
    base = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes, pad_token_id=0))
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config))
    model.save_pretrained(folder)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").numpy(force=True)
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }


def built(folder: Path, **lora: Any) -> Bundle:
    """Build the adapter of a folder for a Phi-3 base."""
    write_base(folder / "base", **CONFIG)
    required = deployment_of(folder, "one", lora_configuration=lora)
    return folders.built(required, folders.workshop(folder)).bundle()


def test_fused_projections_are_split_into_exact_rows(tmp_path):
    """Every row of a fused projection is the slice of PEFT's delta that its module computes."""
    deltas = phi3_adapter(
        tmp_path / "one",
        r=3,
        lora_alpha=7,
        use_rslora=True,
        target_modules="all-linear",
        rank_pattern={"qkv_proj": 5},
        alpha_pattern={r"layers\.1\.mlp\.gate_up_proj": 2},
    )
    bundle = built(tmp_path)
    assert [row.row.module_id for row in bundle.rows] == [1, 2, 3, 4, 5, 6, 7] * 2
    for row in bundle.rows:
        name, begin, end = SLICES[row.row.module]
        expected = deltas[f"model.layers.{row.row.layer}.{name}"][begin:end]
        np.testing.assert_allclose(row.b @ row.a, expected, rtol=1e-5, atol=1e-7)
        assert row.row.rank == (5 if name.endswith("qkv_proj") else 3)
    assert bundle.manifest.tensors_used == 2 * len(deltas)
    assert bundle.manifest.warnings == ()


@pytest.mark.parametrize("ceiling", [["attn_qkv"], ["attn_q", "attn_k", "attn_v"]])
def test_a_ceiling_may_name_the_fused_module_or_its_parts(tmp_path, ceiling):
    """``lora_target_modules`` with attn_qkv allows q, k and v; without one of them the adapter is refused."""
    phi3_adapter(tmp_path / "one", r=2, target_modules=["qkv_proj"])
    assert built(tmp_path, lora_target_modules=ceiling).manifest.modules == ("attn_q", "attn_k", "attn_v")
    with pytest.raises(AdapterInvalid, match="Add attn_v to lora_target_modules"):
        built(tmp_path, lora_target_modules=["attn_q", "attn_k"])


def test_a_fused_projection_and_a_part_of_it_are_refused(tmp_path):
    """Two adapters of one module in one layer have no meaning, and are named."""
    root = "base_model.model.model.layers.0.self_attn"
    values = {
        f"{root}.{leaf}.lora_{side}.weight": np.ones((4, HIDDEN) if side == "A" else (out, 4), np.float16)
        for leaf, out in (("qkv_proj", 2 * HIDDEN), ("k_proj", KV_HEADS * HEAD_DIM))
        for side in "AB"
    }
    write_adapter(tmp_path / "one", values)
    with pytest.raises(AdapterInvalid, match=r"E_PAIR .*expected k_proj once"):
        built(tmp_path)
