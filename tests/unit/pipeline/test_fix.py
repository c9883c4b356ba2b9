"""An adapter that is written again: what stays bit for bit, what is folded or padded, and where it may go."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from builder_service.domain.plain_lora import PlainLora, alpha_of, differences, plain_lora
from builder_service.domain.rules.adapter import open_check
from builder_service.domain.rules.checked import Rulebook
from builder_service.domain.rules.tensor_passes import TensorCheck, check_tensors
from builder_service.domain.rules.tensors import AdapterLimits
from builder_service.pipeline.fix import FixedAdapter, fix_one
from builder_service.pipeline.progress import Progress
from loramux_shared.adapter_files import CONFIG, WEIGHTS
from loramux_shared.bases.read import read_fields
from loramux_shared.bundle.manifest import CONFIG_FILE, WEIGHTS_FILE, bundle_key
from loramux_shared.deployment import Dtype
from loramux_shared.faults import SettingsInvalid
from tests.support.adapters import BASE_CONFIG, Tensors, tensors, write_adapter, write_base
from tests.support.folders import context_of, deployment_of, run_build

Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B, V_A, V_B = Q_A.replace("A.", "B."), Q_A.replace("q_", "v_"), Q_A.replace("q_", "v_").replace("A.", "B.")


def fix(folder: Path, values: Tensors | None = None, out: Path | None = None, **config: Any) -> FixedAdapter:
    """Fix an adapter of these tensors, into the folder `out` unless another one is named."""
    write_base(folder / "base")
    write_adapter(folder / "one", values, **config)
    build = deployment_of(folder, "one").build
    return fix_one(build, context_of(folder), Progress(build.lora_adapters), out or folder / "out")


def written(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """Return what was written: the config and the tensors."""
    return json.loads((folder / "out" / CONFIG).read_text()), load_file(folder / "out" / WEIGHTS)


def test_tensors_of_one_scale_stay_bit_for_bit(tmp_path: Path) -> None:
    """Names change, and the scale of rsLoRA is alpha by rank: no number of a tensor is another one."""
    wrapped = {f"module.{name}": value for name, value in tensors(rank=3).items()}
    fixed = fix(tmp_path, wrapped, target_modules=["q_proj", "v_proj"], use_rslora=True, r=3)
    assert not fixed.findings
    config, found = written(tmp_path)
    assert (config["use_rslora"], config["r"]) == (False, 3)
    assert np.float32(config["lora_alpha"] / config["r"]) == np.float32(8 / math.sqrt(3))
    for name, value in tensors(rank=3).items():
        assert found[name].dtype == value.dtype
        assert found[name].tobytes() == value.tobytes()


def test_scales_that_differ_are_folded_into_b(tmp_path: Path) -> None:
    """B keeps its type where that holds the product, and is float32 where it does not; A stays."""
    fix(tmp_path, alpha_pattern={"v_proj": 3})
    config, found = written(tmp_path)
    assert (config["lora_alpha"], config["r"], config["alpha_pattern"]) == (4, 4, {})
    own = tensors()
    assert found[Q_A].tobytes() == own[Q_A].tobytes()
    assert found[Q_B].dtype == ml_dtypes.bfloat16
    assert found[V_B].dtype == np.float32
    np.testing.assert_array_equal(found[Q_B].astype("f4"), own[Q_B].astype("f4") * 2)
    np.testing.assert_array_equal(found[V_B], own[V_B].astype("f4") * np.float32(0.75))


def test_ranks_that_differ_are_padded_with_zeros(tmp_path: Path) -> None:
    """All modules have the highest rank, so that a server without rank_pattern reads them."""
    values = tensors(("q_proj",), rank=2) | tensors(("v_proj",), rank=5)
    fix(tmp_path, values, r=2, rank_pattern={"v_proj": 5}, alpha_pattern={"v_proj": 20})
    config, found = written(tmp_path)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (5, 20, {})
    assert found[Q_A][:2].tobytes() == values[Q_A].tobytes()
    assert not found[Q_A][2:].any()
    assert not found[Q_B][:, 2:].any()
    assert found[V_B].tobytes() == values[V_B].tobytes()


def test_rows_of_tensorrt_llm_become_a_folder_of_peft(tmp_path: Path) -> None:
    """The two npy files of a converter are written with the names and the config that PEFT has."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "one")
    required = deployment_of(tmp_path, "one", lora_configuration={"dtype": "float32"})
    built, rows = run_build(required, context_of(tmp_path)), tmp_path / "rows"
    rows.mkdir()
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        key = bundle_key(built.generation.adapters["one"].digest, name)
        (rows / name).write_bytes(built.store.get(key))
    build = deployment_of(tmp_path, "rows").build
    fixed = fix_one(build, context_of(tmp_path), Progress(build.lora_adapters), tmp_path / "out")
    assert fixed.changes == ("TensorRT-LLM's rows written out as LoRA of rank 4",)
    config, found = written(tmp_path)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    np.testing.assert_array_equal(found[V_B], tensors()[V_B].astype("f4") * 2)
    assert config["lora_alpha"] == config["r"] == 4


def test_an_alpha_divided_by_the_rank_is_the_scale() -> None:
    """For all ranks and scales of rsLoRA an alpha gives the scale in float32; 0 has none."""
    for rank in range(1, 129):
        for alpha in (1, 3, 16, 0.1):
            found = alpha_of(alpha / math.sqrt(rank), rank)
            assert found is not None
            assert np.float32(found / rank) == np.float32(alpha / math.sqrt(rank))
    assert alpha_of(0.0, 4) is None


def test_a_difference_is_named(tmp_path: Path) -> None:
    """The comparison is number by number: a scale, a tensor or a module that differs is named."""
    before = read(write_adapter(tmp_path / "one"))
    assert differences(before, read(tmp_path / "one")) == []
    other = tensors()
    other[V_B][-1, -1] += 1
    assert differences(before, read(write_adapter(tmp_path / "other", other))) == [
        "model.layers.0.self_attn.v_proj"
    ]
    assert len(differences(before, read(write_adapter(tmp_path / "scaled", lora_alpha=9)))) == 4
    fewer = read(write_adapter(tmp_path / "fewer", tensors(("q_proj",))))
    assert differences(before, fewer) == [f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)]


def read(folder: Path) -> PlainLora:
    """Return an adapter as plain LoRA."""
    limits = AdapterLimits(read_fields(BASE_CONFIG), 64, frozenset())
    check = open_check(folder, Rulebook(limits, ("LlamaForCausalLM",), Dtype.FLOAT32))
    assert isinstance(check, TensorCheck)
    assert not check_tensors(check).errors
    return plain_lora(check)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda out: out.write_text("x"), "a file"),
        (lambda out: (out.mkdir(), (out / "x").write_text("x")), "a folder with files"),
        (lambda out: out.symlink_to(out.parent), "a link"),
        (lambda out: (out.parent / "models--org--name").mkdir(), "a folder of the hub's cache"),
    ],
)
def test_nothing_is_replaced(tmp_path: Path, make: Callable[[Path], object], problem: str) -> None:
    """A folder that is there stays as it is, and one of the hub's cache is none of ours."""
    make(tmp_path / "out")
    with pytest.raises(SettingsInvalid, match=f"found {problem}"):
        fix(tmp_path, use_rslora=True)
    assert not any(path.name == CONFIG for path in (tmp_path / "out").glob("*"))
    assert not list(tmp_path.glob(".out*"))
