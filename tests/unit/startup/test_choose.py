"""The choice of a replica's kernels: an explicit one is used, or refused by name."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inference_service.core.computing import COST, CURES, Lack
from inference_service.engine.kernels.cpu import build
from inference_service.engine.kernels.cpu.build import Built
from inference_service.startup.choose import (
    TRITONS,
    check_cache_dtype,
    check_launchers,
    check_triton,
    choose_backend,
)
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.read import read_fields
from loramux_shared.faults import SettingsInvalid
from loramux_shared.settings import InferenceSettings
from tests.support.native import open_native
from tests.support.root import ROOT
from tests.support.tiny import SIZES


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-6}
    return read_fields(SIZES | fields | {"hidden_act": "silu", "torch_dtype": "float32"})


def _settings(tmp_path: Path, **settings: object) -> InferenceSettings:
    return InferenceSettings.model_validate({"deployment": "tiny", "cache_dir": tmp_path} | settings)


@pytest.mark.parametrize(
    ("settings", "product"),
    [
        ({}, "float32 by torch; the checkpoint is float32"),
        ({"dtype": "bfloat16"}, "bfloat16 by torch; LORAMUX_DTYPE=bfloat16"),
        ({"quantization": "int8"}, "int8 widened piece by piece by torch; the checkpoint is float32"),
    ],
)
def test_how_weights_are_multiplied_is_reported_with_its_reason(
    config: ModelConfig, tmp_path, settings, product
) -> None:
    """The torch backend's products are torch's; the native product depends on the processor."""
    chosen = choose_backend(_settings(tmp_path, backend="torch", device="cpu", **settings), config)
    assert chosen.computing.product == product


@pytest.mark.parametrize(("settings", "dtype"), [({}, "bfloat16"), ({"native": False}, "float32")])
def test_a_processor_that_cannot_multiply_bfloat16_reads_it_nevertheless(
    config: ModelConfig, native_folder: Path, monkeypatch: pytest.MonkeyPatch, settings, dtype: str
) -> None:
    """The compiled product widens it in registers; torch's would take several times as long as float32."""
    if open_native(native_folder).library is None:
        pytest.skip("no C++ compiler")
    for lacking in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, lacking, lambda: False)
    expected = _settings(native_folder.parent, device="cpu", **settings)
    chosen = choose_backend(expected, replace(config, dtype="bfloat16"))
    assert str(chosen.dtype) == f"torch.{dtype}"
    assert (chosen.computing.backend == "native") == (dtype == "bfloat16")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"native": False}, "LORAMUX_NATIVE=false"),
        ({"dtype": "float16"}, "float32 and bfloat16.*LORAMUX_DTYPE=float16"),
        ({"block_size": 8}, "multiples of 16.*LORAMUX_BLOCK_SIZE=8"),
    ],
)
def test_native_that_cannot_be_is_refused(config: ModelConfig, native_folder: Path, settings, why: str) -> None:
    """An explicit choice is not replaced in silence; auto is, and the start line says so."""
    with pytest.raises(SettingsInvalid, match=f"LORAMUX_BACKEND=native.*{why}"):
        choose_backend(_settings(native_folder.parent, backend="native", **settings), config)
    chosen = choose_backend(_settings(native_folder.parent, device="cpu", **settings), config).computing
    assert re.search(why, chosen.how)
    assert chosen.lack == (None if "native" in settings else Lack.UNSUPPORTED)


@pytest.mark.parametrize("lack", [Lack.NO_COMPILER, Lack.NOT_COMPILED, Lack.WRONG_RESULT])
def test_torch_in_the_place_of_compiled_operations_has_a_warning(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lack: Lack
) -> None:
    """The warning has the reason, the cost and the cure; torch's operations by request have none."""
    monkeypatch.setattr(build, "load", lambda _: Built(None, "torch operations (no luck)", lack))
    chosen = choose_backend(_settings(tmp_path, device="cpu"), config).computing
    assert (chosen.backend, chosen.lack) == ("torch", lack)
    assert chosen.warning == f"torch operations (no luck): {COST}; {CURES[lack]}"
    assert choose_backend(_settings(tmp_path, backend="torch", device="cpu"), config).computing.warning is None


def test_a_cache_of_8_bits_is_refused_where_it_cannot_be(
    config: ModelConfig, native_folder: Path, tmp_path
) -> None:
    """The CPU's compiled operations and older GPUs refuse their unsupported types, each with the setting."""
    expected = _settings(tmp_path, backend="torch", device="cpu", kv_cache_dtype="int8")
    reference = choose_backend(expected, config)
    assert reference.cache_dtype is torch.int8
    check_cache_dtype(_settings(tmp_path, kv_cache_dtype="int8"), (8, 0))
    check_cache_dtype(_settings(tmp_path, kv_cache_dtype="fp8"), (8, 9))
    with pytest.raises(SettingsInvalid, match=r"=fp8 needs a GPU of capability 8\.9, found 8\.6\. Set int8"):
        check_cache_dtype(_settings(tmp_path, kv_cache_dtype="fp8"), (8, 6))
    if open_native(native_folder).library is not None:
        with pytest.raises(SettingsInvalid, match=r"CACHE_DTYPE=int8 needs a GPU.*LORAMUX_BACKEND=torch"):
            choose_backend(_settings(native_folder.parent, device="cpu", kv_cache_dtype="int8"), config)


def test_a_triton_that_the_kernels_were_not_compiled_with_is_refused_by_name() -> None:
    """Patches of known versions are served; the refusal names the installed version and the cure."""
    for each in TRITONS:
        check_triton(f"{each}.1")
        check_triton(f"{each}.0+git8a.1")
    first, *_, last = (int(each.removeprefix("3.")) for each in TRITONS)
    assert f'"triton>=3.{first},<3.{last + 1}"' in (ROOT / "pyproject.toml").read_text()
    with pytest.raises(SettingsInvalid, match=r"Triton 3\.10\.0 is installed.*3\.7 \(torch 2\.12 and 2\.13\)"):
        check_triton("3.10.0")


def test_a_machine_that_cannot_compile_launchers_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal names what Triton lacks, and the setting; launchers of a former start need neither."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    lacking = r"finds no C compiler \(gcc\) and no headers of Python \(Python\.h\)\. .*LORAMUX_BACKEND=torch"
    with pytest.raises(SettingsInvalid, match=lacking):
        check_launchers(tmp_path)
    (tmp_path / "Python.h").touch()
    with pytest.raises(SettingsInvalid, match=r"finds no C compiler \(gcc\)\. Install"):
        check_launchers(tmp_path)
    monkeypatch.setenv("CC", "/opt/cc")
    check_launchers(tmp_path)
    monkeypatch.delenv("CC")
    (tmp_path / "cache" / "digest").mkdir(parents=True)
    (tmp_path / "cache" / "digest" / "cuda_utils.so").touch()
    check_launchers(tmp_path / "nowhere")
