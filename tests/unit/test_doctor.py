"""``loramux doctor``: what is installed, what fits, what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from inference_service.lora.weights import Matrices, pack_adapter
from loramux.cli.main import app
from loramux.doctor import installed, machine
from loramux.doctor.machine import look_at_inference, look_at_machine, look_at_store
from loramux.doctor.sizes import read_base, sizes_of
from loramux_shared.bases.read import read_config
from loramux_shared.bundle.modules import MODULES
from loramux_shared.faults import CheckpointInvalid
from tests.unit.fake_services import Fakes

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 199,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a config.json."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def doctor(*args: str | Path) -> tuple[int, str]:
    """Run the command; returns its exit code and stdout."""
    result = CliRunner().invoke(app, ["doctor", *map(str, args)])
    return result.exit_code, result.stdout


def test_extras_name_what_they_lack() -> None:
    """An extra that names others needs what they need; those for development are left out."""
    requirements = [
        "typer>=0.15",
        "numpy>=2; extra == 'store'",
        'no-such-thing>=1; extra == "store"',
        "loramux[store]; extra == 'builder'",
        "pydantic[email]>=2; extra == 'builder'",
        "neither; extra == 'test'",
    ]
    store, builder = installed.extras(requirements)
    assert (store.name, store.missing) == ("store", ("no-such-thing",))
    assert (builder.name, builder.missing) == ("builder", ("no-such-thing",))
    assert builder.cure == "pip install 'loramux[builder]'"


def test_versions_of_what_is_there() -> None:
    """A package is known by its version, a missing one by None."""
    assert installed.versions()["torch"] == torch.__version__
    assert installed.version_of("no-such-thing") is None


def test_an_adapter_takes_what_is_said(base: Path) -> None:
    """The bytes of an adapter are those that the engine's own packing takes."""
    config = read_config(base)
    rows = [
        Matrices(layer, module.name, torch.zeros(8, inside), torch.zeros(outside, 8))
        for layer in range(config.dims.num_layers)
        for module in MODULES
        for inside, outside in [config.dims.features(module)]
    ]
    packed = pack_adapter(rows, config.groups, config.dims.num_layers, torch.bfloat16, torch.device("cpu"))
    tensors = [
        tensor
        for layer in packed.layers
        for group in layer.values()
        for tensor in (group.a, *group.b)
        if tensor is not None
    ]
    said = sizes_of(LLAMA, "bfloat16", 10**9, 0).fits[0]
    assert said.rank == 8
    assert said.adapter_bytes == sum(tensor.nbytes for tensor in tensors)


def test_what_fits_beside_weights_and_cache() -> None:
    """Adapters share what weights and cache leave; a cache that nobody sized takes a quarter."""
    sizes = sizes_of(LLAMA, "float32", 10_000_000, 1_000_000)
    assert sizes.kv_token_bytes == 2 * 2 * 2 * 8 * 4
    assert sizes.kv_tokens == 1_000_000 // sizes.kv_token_bytes
    room = 10_000_000 - sizes.weights_bytes - 1_000_000
    assert [fit.adapters for fit in sizes.fits] == [room // fit.adapter_bytes for fit in sizes.fits]
    assert sizes_of(LLAMA, "float32", 10_000_000, None).kv_bytes == (10_000_000 - sizes.weights_bytes) // 4
    assert sizes_of(LLAMA, "float32", 1000, None).fits[0].adapters == 0


def test_a_base_is_a_folder_or_its_config(base: Path) -> None:
    """Both name the same file; anything else is a base that is none."""
    assert read_base(base) == read_base(base / "config.json") == LLAMA
    (base / "list.json").write_text("[]")
    for wrong in (base / "list.json", base / "nowhere.json"):
        with pytest.raises(CheckpointInvalid, match="expected"):
            read_base(wrong)


def test_a_store_answers_or_not(tmp_path: Path) -> None:
    """A store is fine when it answers, empty or not; a wrong address is told."""
    assert look_at_store(f"file://{tmp_path}").state == "answers, 0 deployments"
    assert not look_at_store("ftp://nowhere").ok


def test_a_store_without_its_packages_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 needs an extra, which is said with what installs it."""
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.delitem(sys.modules, "loramux_shared.storage.s3", raising=False)
    assert (
        "needs boto3, not installed here: pip install 'loramux[store]'" in look_at_store("s3://bucket/x").state
    )


def test_a_cache_that_does_not_exist_yet(tmp_path: Path) -> None:
    """The free space is that of the disk on which it would be made."""
    found = look_at_machine(tmp_path / "not" / "yet")
    assert found.cache_free_bytes > 0
    assert found.cores >= 1


def test_no_torch_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the inference extra there is a reason with its cure instead of a device."""
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda _: None)
    assert look_at_inference(tmp_path) == "torch is not installed: pip install 'loramux[inference]'"


def test_all_of_it(base: Path, fakes: Fakes) -> None:
    """For people and for machines: device, backend, services, and what fits; nothing is wrong."""
    at = ("--grpc", fakes.inference_address, "--builder", "127.0.0.1:1", "--store", f"file://{base}")
    code, text = doctor("--base", base, "--kv-gb", "0.001", *at, "--json")
    found = json.loads(text)["diagnosis"]
    assert code == 0, found["problems"]
    assert found["inference"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found["inference"]["backend"] in ("native", "torch", "triton")
    assert [place["ok"] for place in found["places"]] == [True, False, True]
    assert [fit["rank"] for fit in found["base"]["fits"]] == [8, 16, 32, 64]


def test_what_is_wrong_is_exit_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that stops the services is wrong here too; what is not running is not."""
    monkeypatch.setenv("LORAMUX_STORRE", "x")
    code, text = doctor("--grpc", "127.0.0.1:1", "--builder", "127.0.0.1:1")
    assert code == 1
    assert "wrong: LORAMUX_STORRE: unknown setting, did you mean LORAMUX_STORE?" in text
    assert "inference    127.0.0.1:1: nothing answers there" in text
