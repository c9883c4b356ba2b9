"""Low-bit weights widen to the values of the format's own library, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from inference_service.engine.models import packed
from inference_service.engine.models.checkpoint import Checkpoint
from loramux_shared.bases.formats import read_quantization, with_quantize
from loramux_shared.bases.read import read_config
from loramux_shared.faults import CheckpointInvalid
from tests.support.cases import cases
from tests.support.lowbit_files import KINDS, gptq
from tests.support.root import ROOT

WRITTEN = ROOT / "tests/golden" / "formats"
CPU = torch.device("cpu")
PACKED, INTEGERS = "pack-quantized", "int-quantized"


def described(config: dict[str, Any]) -> Any:
    """Return the description of the weights' storage in a base's config."""
    return read_quantization({"quantization_config": config}, architecture="LlamaForCausalLM")


def checkpoint(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], dtype: torch.dtype
) -> Checkpoint:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return Checkpoint(folder, dtype, CPU, quantization=described(config))


def kept(
    folder: Path,
    kind: str,
    change: Callable[[dict[str, Tensor]], object] = lambda _: None,
    shape: tuple[int, int] = (48, 80),
    dtype: torch.dtype = torch.float32,
) -> tuple[Checkpoint, Tensor]:
    """A checkpoint of a random weight as its library keeps it, with changed tensors, and the widened weight."""
    tensors, widened = KINDS[kind].keep(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    change(tensors)
    named = {f"layer.{name}": tensor for name, tensor in tensors.items()}
    return checkpoint(folder, named, KINDS[kind].config, dtype), widened


def read_written(name: str) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """The config, the tensors and the widened weight of a file of `tests/golden/formats`."""
    with safe_open(WRITTEN / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        config = json.loads(file.metadata()["config"])
    [widened] = [tensors.pop(key) for key in list(tensors) if key.startswith("widened.")]
    return config, tensors, widened


@pytest.mark.parametrize("name", sorted(path.stem for path in WRITTEN.glob("*.safetensors")))
def test_a_weight_is_what_its_library_says(tmp_path: Path, name: str) -> None:
    """A weight equals its library's, in the type in which that library widens it."""
    config, tensors, widened = read_written(name)
    found = checkpoint(tmp_path, tensors, config, widened.dtype).get("layer.weight", tuple(widened.shape))
    assert found.dtype == widened.dtype
    assert torch.equal(found, widened)


@pytest.mark.parametrize("name", sorted(path.stem for path in WRITTEN.glob("gptq-*.safetensors")))
def test_gptq_is_described_by_a_file_beside_the_config_too(tmp_path: Path, name: str) -> None:
    """A file of AutoGPTQ without a method describes GPTQ; the config's own description counts before it."""
    config, tensors, widened = read_written(name)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(LlamaConfig(architectures=["LlamaForCausalLM"]).to_dict()))
    own = {key: value for key, value in config.items() if key != "quant_method"}
    beside = own | {"damp_percent": 0.01, "static_groups": False, "model_file_base_name": "model"}
    (tmp_path / "quantize_config.json").write_text(json.dumps(beside))
    found = read_config(tmp_path).quantization
    read = Checkpoint(tmp_path, widened.dtype, CPU, quantization=found)
    assert torch.equal(read.get("layer.weight", tuple(widened.shape)), widened)
    stated = with_quantize({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, beside)
    assert stated == {"text_config": {"quantization_config": {"quant_method": "fp8"}}}
    assert with_quantize({}, beside | {"method": "awq"})["quantize_config.json"]["quant_method"] == "awq"
    (tmp_path / "quantize_config.json").write_text(json.dumps(beside | {"bits": 3}))
    with pytest.raises(CheckpointInvalid, match=r"quantize_config\.json\.bits 3"):
        read_config(tmp_path)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_number_of_fp8_is_read(tmp_path: Path, kind: torch.dtype, dtype: torch.dtype) -> None:
    """Every number of both FP8 types is read, subnormal ones too; NaN and infinity are refused."""
    every = torch.arange(256, dtype=torch.uint8).view(kind)
    finite = every[every.float().isfinite()]
    weight, scale = finite.repeat(2, 1), torch.tensor([[0.25], [3.7]])
    config = {"quant_method": "fp8", "weight_block_size": None}
    tensors = {"layer.weight": weight, "layer.weight_scale": scale}
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, dtype)
    assert torch.equal(checkpoint(tmp_path, tensors, config, dtype).get("layer.weight", weight.shape), expected)
    for wrong in every[~every.float().isfinite()]:
        tensors["layer.weight"] = torch.cat([weight, wrong.repeat(2, 1)], 1)
        read = checkpoint(tmp_path, tensors, config, dtype)
        with pytest.raises(CheckpointInvalid, match="found NaN or infinite ones"):
            read.get("layer.weight", (2, len(finite) + 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("block", "shape", "grid"),
    [
        ([16, 32], (48, 96), (3, 3)),
        ([16, 32], (3, 48, 96), (3, 3, 3)),
        (None, (48, 96), ()),
        (None, (48, 96), (48, 1)),
    ],
)
def test_fp8_is_what_transformers_says(
    tmp_path: Path, block: list[int] | None, shape: tuple[int, ...], grid: tuple[int, ...], dtype: torch.dtype
) -> None:
    """FP8 equals transformers' in blocks, of one matrix or of experts; per tensor; per row."""
    weight, scale = torch.randn(shape).to(torch.float8_e4m3fn), torch.rand(grid) + 0.01
    config = {"quant_method": "fp8", "weight_block_size": block}
    name, suffix = ("layer.weight", "_scale_inv") if len(shape) == 2 else ("experts.down_proj", "_scale_inv")
    tensors = {name: weight, name + suffix: scale}
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale.reshape(grid or (1, 1)), dtype)
    assert torch.equal(checkpoint(tmp_path, tensors, config, dtype).get(name, shape), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_scales_that_are_exponents_are_powers_of_two(tmp_path: Path, dtype: torch.dtype) -> None:
    """Scales that are exponents are powers of two, as ``scale_fmt`` ue8m0 has them, in either type."""
    weight = torch.randn(32, 64).to(torch.float8_e4m3fn)
    scale = torch.randint(110, 140, (2, 2), dtype=torch.uint8)
    config = {"quant_method": "fp8", "weight_block_size": [16, 32], "scale_fmt": "ue8m0"}
    tensors = {"layer.weight": weight, "layer.weight_scale_inv": scale.view(dtype)}
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(
        checkpoint(tmp_path, tensors, config, torch.float32).get("layer.weight", (32, 64)), expected
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_is_what_transformers_says(tmp_path: Path, dtype: torch.dtype) -> None:
    """Experts are transposed from [out, in] to [in, out]; other tensors are read unchanged."""
    blocks = torch.randint(0, 256, (3, 24, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 150, (3, 24, 2), dtype=torch.uint8)
    bias = torch.randn(3, 24)
    tensors = {
        "experts.gate_up_proj_blocks": blocks,
        "experts.gate_up_proj_scales": scales,
        "experts.gate_up_proj_bias": bias,
    }
    read = checkpoint(tmp_path, tensors, {"quant_method": "mxfp4"}, dtype)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert torch.equal(read.get("experts.gate_up_proj", (3, 64, 24)), expected)
    assert torch.equal(read.get("experts.gate_up_proj_bias", (3, 24)), bias.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_takes_several_chunks_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    """A weight is rounded once from float32, at any beginning of a chunk within blocks and words."""
    monkeypatch.setattr(packed, "CHUNK", 1)
    read, widened = kept(tmp_path, kind, shape=(600, 80), dtype=dtype)
    assert torch.equal(read.get("layer.weight", (600, 80)), widened.to(dtype))


def test_what_is_kept_as_it_is_is_served_as_it_is(tmp_path: Path) -> None:
    """A linear is served in the format of its tensors, whatever the config says."""
    plain, (tensors, _) = torch.randn(16, 32), KINDS["gptq"].keep(torch.randn(16, 32))
    named = {f"two.{name}": tensor for name, tensor in tensors.items()} | {"one.weight": plain}
    read = checkpoint(tmp_path, named, KINDS["gptq"].config, torch.float32)
    assert read.has("two.weight")
    assert read.first(["three.weight", "two.weight"]) == "two.weight"
    assert not read.has("three.weight")
    assert torch.equal(read.get("one.weight", (16, 32)), plain)


def _to(name: str, value: Any = None) -> Any:
    def change(tensors: dict[str, Tensor]) -> None:
        own = tensors.pop(name, None)
        if value is not None:
            tensors[name] = value(own) if callable(value) else value

    return change


def _state(**fields: Any) -> Any:
    def change(tensors: dict[str, Tensor]) -> None:
        name = "weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[name].tolist())) | fields
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def _plain_zeros(tensors: dict[str, Tensor]) -> None:
    words = tensors["weight_zero_point"].T.contiguous().view(torch.uint8)
    numbers = torch.stack((words & 15, words >> 4), dim=-1).flatten(-2)[:, :48].T
    tensors["weight_zero_point"] = numbers.to(torch.int8) - 8


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (PACKED, _to("weight_g_idx", torch.full((80,), -1))),
        (PACKED, _to("weight_g_idx", torch.arange(80) // 16)),
        (PACKED, _plain_zeros),
        ("pack-symmetric", _to("weight_zero_point", torch.zeros(48, 5).char())),
        (INTEGERS, _to("weight_zero_point", torch.zeros(48, 1).char())),
        (INTEGERS, _to("weight_scale", lambda scale: scale.flatten())),
        ("nf4", _to("weight", lambda data: data.flatten().view(torch.bfloat16).view(-1, 1))),
        ("nf4", _to("weight", lambda data: data.flatten().view(torch.float32))),
        ("int8", _to("SCB", lambda largest: largest[:, None])),
        ("int8", _to("weight_format")),
        ("fp8", _to("input_scale", torch.ones(1))),
    ],
)
def test_other_forms_mean_the_same(tmp_path: Path, kind: str, change: Any) -> None:
    """Files of other versions of the libraries have the same meaning."""
    read, widened = kept(tmp_path, kind, change)
    assert torch.equal(read.get("layer.weight", (48, 80)), widened)


def test_blocks_are_read_of_a_file_of_gguf_alone(tmp_path: Path) -> None:
    """A config that describes safetensors as GGUF has no weights of few bits, and is refused by the tensor."""
    found = checkpoint(tmp_path, {"layer.weight.Q4_0": torch.zeros(1)}, {"quant_method": "gguf"}, torch.float32)
    with pytest.raises(CheckpointInvalid, match="lacks the tensor"):
        found.get("layer.weight", (4, 4))


def test_columns_in_turn_need_not_be_numbered(tmp_path: Path) -> None:
    """GPTQ's ordered columns are numbered, even if only one after the other; elsewhere they may be."""
    tensors, widened = gptq(torch.randn(48, 80), shuffled=False)
    for ordered in (True, False):
        named = {f"layer.{name}": tensor for name, tensor in tensors.items() if ordered or name != "g_idx"}
        config = KINDS["gptq"].config | {"desc_act": ordered}
        read = checkpoint(tmp_path, named, config, torch.float32)
        assert torch.equal(read.get("layer.weight", (48, 80)), widened)


def test_four_bits_of_bitsandbytes_are_of_the_type_that_they_were_quantised_from(tmp_path: Path) -> None:
    """Four-bit weights widen to the type before quantization, also where a wider type is served."""
    config, tensors, widened = read_written("bitsandbytes-nf4-double")
    found = checkpoint(tmp_path, tensors, config, torch.float32).get("layer.weight", tuple(widened.shape))
    assert widened.dtype == torch.bfloat16
    assert torch.equal(found, widened.float())


def test_values_beyond_a_type_are_refused(tmp_path: Path) -> None:
    """Values that float16 would make infinite are refused; bfloat16 holds them."""
    weight, config = torch.full((16, 32), 448.0), {"quant_method": "fp8", "weight_block_size": None}
    tensors = {"one.weight": weight.to(torch.float8_e4m3fn), "one.weight_scale": torch.tensor(1e3)}
    wide = checkpoint(tmp_path, tensors, config, torch.bfloat16).get("one.weight", (16, 32))
    assert torch.equal(wide, (1e3 * weight).bfloat16())
    with pytest.raises(CheckpointInvalid, match=r"finite numbers of float16, found 448000\.0 to 448000\.0"):
        checkpoint(tmp_path, tensors, config, torch.float16).get("one.weight", (16, 32))


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        *cases(__file__, "test_hostile_tensors_are_refused_by_name"),
        ("fp8", _to("weight_scale_inv", lambda scale: scale * torch.nan), "found nan to nan"),
        ("fp8", _to("weight", lambda weight: (weight.float() * torch.nan).to(weight.dtype)), "found NaN"),
        (
            "fp8",
            _to("weight", lambda weight: weight.bfloat16()),
            "expected float8_e4m3fn, float8_e5m2, found bfloat16",
        ),
        ("fp8", _to("weight", lambda weight: weight[1:]), r"expected shape \(48, 80\), found \(47, 80\)"),
        (PACKED, _to("weight_shape", torch.tensor([48, 79])), r"implies \[48, 80\], found \[48, 79\]"),
        ("gptq", _to("qzeros", lambda zeros: zeros[:, :1]), r"expected shape \(5, 6\)"),
        ("gptq", _to("scales", lambda scale: scale * torch.inf), "found nan to nan"),
        ("gptq", _to("qweight", lambda words: words.long()), "expected int32, found int64"),
        ("nf4", _to("weight.quant_map", torch.linspace(-1, 1, 16)), "the sixteen numbers of nf4, found others"),
        ("nf4", _to("weight", lambda data: data[1:]), "expected 1920 bytes, found 1919"),
    ],
)
def test_hostile_tensors_are_refused_by_name(tmp_path: Path, kind: str, change: Any, expected: str) -> None:
    """A refusal has the found and the expected value; nothing is guessed, and nothing is left over."""
    if isinstance(change, list):
        name, shape, value, dtype = change
        change = _to(name, torch.full(shape, value, dtype=getattr(torch, dtype)))
    elif not callable(change):  # the name of a tensor that is absent, or fields of a state
        change = _to(change) if isinstance(change, str) else _state(**change)
    with pytest.raises(CheckpointInvalid, match=expected):
        kept(tmp_path, kind, change)[0].get("layer.weight", (48, 80))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"experts.gate_up_proj_scales": torch.full((2, 8, 1), 255).byte()}, "found 255, which is no number"),
        ({"experts.gate_up_proj_scales": torch.zeros(2, 8, 2).byte()}, r"expected shape \(2, 8, 1\)"),
        ({"experts.gate_up_proj_blocks": torch.zeros(2, 8, 1, 8).byte()}, r"expected shape \(2, 8, 1, 16\)"),
    ],
)
def test_hostile_experts_are_refused_by_name(tmp_path: Path, change: dict[str, Tensor], expected: str) -> None:
    """A refusal has the found and the expected value."""
    tensors = {
        "experts.gate_up_proj_blocks": torch.zeros(2, 8, 1, 16).byte(),
        "experts.gate_up_proj_scales": torch.zeros(2, 8, 1).byte(),
    }
    read = checkpoint(tmp_path, tensors | change, {"quant_method": "mxfp4"}, torch.float32)
    with pytest.raises(CheckpointInvalid, match=expected):
        read.get("experts.gate_up_proj", (2, 32, 8))
