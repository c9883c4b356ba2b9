import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save_file

from loramux_shared.bundle.reader import Bundle, BundleRow
from tests.property.peft_draws import DTYPES, LAYERS, Draw, Saved, draws, save
from tests.support import folders
from tests.support.adapters import BASE_CONFIG, write_base
from tests.support.examples import examples
from tests.support.folders import deployment_of, workshop

CONFIG = BASE_CONFIG | {"num_hidden_layers": LAYERS}
GROUPS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_dense": "self_attn.o_proj", "mlp_h_to_4h": "mlp.gate_proj", "mlp_4h_to_h": "mlp.down_proj",
    "mlp_gate": "mlp.up_proj",
}  # fmt: skip
OF_NO_LAYER = {"embedding": "model.embed_tokens", "head": "lm_head"}
# Half the distance of two neighbours: relative for normal numbers, absolute below the smallest of them.
UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TINY = {"float32": 2.0**-150, "float16": 2.0**-25, "bfloat16": 2.0**-134}


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """A folder with the base, and the base as a model."""
    folder = tmp_path_factory.mktemp("property")
    write_base(folder / "base", num_hidden_layers=LAYERS)
    torch.set_num_threads(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight.data.zero_()  # the base's own on the disk: PEFT saves them beside adapters of them
    weights = {name: each.contiguous() for name, each in model.state_dict().items()}
    save_file(weights, folder / "base" / "model.safetensors")
    return folder, model


def built(folder: Path, storage: str) -> Bundle:
    """Build the adapter of a folder through the whole pipeline, and read its bundle."""
    required = deployment_of(folder, "adapter", lora_configuration={"dtype": storage})
    return folders.built(required, workshop(folder)).bundle("adapter")


def check_row(row: BundleRow, saved: Saved, storage: str) -> None:
    """A and sB are PEFT's, each rounded once, so their product is PEFT's delta within that rounding."""
    kind = DTYPES[storage]
    a, b = (np.asarray(side, np.float32) for side in (row.a, row.b))
    scaled = saved.b * torch.tensor(saved.scaling, dtype=torch.float32)
    np.testing.assert_array_equal(a, saved.a.to(kind).float().numpy())
    np.testing.assert_array_equal(b, scaled.to(kind).float().numpy())

    exact_a, exact_b = (side.double().abs().numpy() for side in (saved.a, scaled))
    unit, tiny, rank = UNIT[storage], TINY[storage], row.row.rank
    # (B + dB)(A + dA) - BA, with |dX| <= unit |X| + tiny; then PEFT's own sums and scaling in float32.
    rounding = (2 * unit + unit**2) * (exact_b @ exact_a)
    rounding += tiny * (1 + unit) * (exact_a.sum(0)[None, :] + exact_b.sum(1)[:, None]) + rank * tiny**2
    rounding += (rank + 4) * 2.0**-24 * (exact_b @ exact_a)
    product = b.astype(np.float64) @ a.astype(np.float64)
    error = np.abs(product - saved.delta.double().numpy())
    assert (error <= rounding).all()
    assert row.row.norm_ba == pytest.approx(np.linalg.norm(product), rel=1e-4)
    check_vectors(row, saved, storage)


def check_vectors(row: BundleRow, saved: Saved, storage: str) -> None:
    """c is PEFT's to twice the digits of a narrow type, and d to one rounding; none where they do nothing."""
    c, d, rest = (*row.vectors.astype(np.float32), None, None, None)[:3]
    c = np.ones(row.row.out_features, "f4") if c is None else c + (0 if rest is None else rest)
    both = 2.0**-20 + (UNIT[storage] ** 2 if storage != "float32" else 0)
    np.testing.assert_allclose(c, saved.c.numpy(), rtol=both, atol=2.0**-24 if storage == "float16" else 0)
    np.testing.assert_allclose(0 if d is None else d, saved.d.numpy(), rtol=2 * UNIT[storage], atol=1e-7)
    assert bool(row.row.vectors) == bool((saved.c != 1).any() or saved.d.any())


def check(draw: Draw, room: tuple[Path, torch.nn.Module]) -> None:
    """Save with PEFT, build, and compare every module."""
    folder, base = room
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = save(base, draw, folder / "adapter")
    bundle = built(folder, draw.storage)
    names = {
        OF_NO_LAYER.get(row.row.module) or f"model.layers.{row.row.layer}.{GROUPS[row.row.module]}": row
        for row in bundle.rows
    }
    assert sorted(names) == sorted(saved)
    tensors = 2 + ("use_dora" in draw.config) + ("lora_bias" in draw.config)
    assert len(bundle.manifest.coverage.used) == tensors * len(saved)
    for name, row in names.items():
        check_row(row, saved[name], draw.storage)


@given(draw=draws())
@settings(
    max_examples=examples(10),
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_every_delta_is_peft_s_own(room, draw):
    """The bundle holds the delta of every module that PEFT saves, to one rounding of the storage type."""
    check(draw, room)
