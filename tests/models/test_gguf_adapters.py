"""An adapter that llama.cpp's converter wrote is the adapter that PEFT saved, or it is refused by name."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import Gemma3TextConfig, GraniteConfig, LlamaConfig, Phi3Config, PreTrainedConfig, Qwen3Config

from builder_service.pipeline.fix import fix_one
from builder_service.pipeline.progress import Progress
from loramux_shared.faults import AdapterInvalid, CheckpointInvalid
from loramux_shared.spelling import parse_repository
from tests.support import adapters, tiny
from tests.support.cases import cases
from tests.support.folders import context_of, deployment_of, local_source, run_build
from tests.support.gguf_files import WRITTEN, write_adapter
from tests.support.root import ROOT

SIZES: dict[str, Any] = tiny.SIZES | {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def make(folder: Path, config: PreTrainedConfig, targets: list[str], **options: Any) -> dict[str, Any]:
    """Make a base, an adapter of PEFT and the same one in GGUF; return the base's config."""
    tiny.make_checkpoint(folder / "base", config)
    ranks = {targets[1]: 3}
    tiny.make_adapter(
        folder / "base", folder / "peft", 1, r=4, lora_alpha=6, target_modules=targets, rank_pattern=ranks
    )
    return convert(folder, **options)


def convert(folder: Path, name: str = "gguf/my-lora-f16.gguf", **options: Any) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / "base" / "config.json").read_text())
    (folder / name).parent.mkdir(exist_ok=True)
    write_adapter(folder / name, folder / "peft", fields, **options)
    return fields


def bundles(folder: Path, *names: str, **lora: Any) -> list[dict[str, str]]:
    """Return the digests of the files of adapters' bundles."""
    built = run_build(
        deployment_of(folder, *names, lora_configuration={"dtype": "float32"} | lora), context_of(folder)
    )
    return [{name: file.sha256 for name, file in built.bundle(each).manifest.files.items()} for each in names]


@pytest.mark.parametrize(
    ("config", "targets", "kind"),
    [
        (LlamaConfig(**SIZES), [*LINEARS, "embed_tokens", "lm_head"], "F32"),
        (LlamaConfig(**SIZES), LINEARS, "Q8_0"),
        (Qwen3Config(**SIZES), LINEARS, "F16"),
        (GraniteConfig(**SIZES), LINEARS, "BF16"),
        (Gemma3TextConfig(**SIZES), LINEARS, "F32"),
        (Phi3Config(**SIZES, pad_token_id=0), FUSED, "F32"),
    ],
    ids=lambda each: getattr(each, "model_type", str(each)),
)  # fmt: skip
def test_a_bundle_is_that_of_the_original(tmp_path: Path, config: Any, targets: list[str], kind: str) -> None:
    """Bit for bit, for each type that the converter writes, of turned rows, fused linears and embeddings."""
    make(tmp_path, config, targets, kind=kind)
    peft, gguf = bundles(tmp_path, "peft", "gguf")
    assert peft == gguf


def test_a_file_of_llama_cpps_own_converter_is_the_original(tmp_path: Path) -> None:
    """The script wrote the file of this adapter, in bfloat16: 4 heads of queries, 2 of keys, embeddings."""
    draw, values = np.random.default_rng(1), adapters.tensors(tuple(adapters.FEATURES), layers=1)
    for side, shape in {"A": (4, adapters.VOCAB), "B": (adapters.HIDDEN, 4)}.items():
        name = f"base_model.model.model.embed_tokens.lora_embedding_{side}"
        values[name] = draw.normal(size=shape).astype(ml_dtypes.bfloat16)
    adapters.write_base(tmp_path / "base")
    targets = [*adapters.FEATURES, "embed_tokens"]
    adapters.write_adapter(tmp_path / "peft", values, target_modules=targets, lora_alpha=6)
    (tmp_path / "gguf").mkdir()
    shutil.copy(ROOT / "tests/golden/formats/llama-cpp-lora.gguf", tmp_path / "gguf")
    peft, gguf = bundles(tmp_path, "peft", "gguf")
    assert peft == gguf


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter of two modules."""
    folder = tmp_path_factory.mktemp("small")
    adapters.write_base(folder / "base")
    values = {name: each.astype(np.float32) for name, each in adapters.tensors(("q_proj", "up_proj")).items()}
    adapters.write_adapter(folder / "peft", values)
    return folder


@pytest.mark.parametrize(("fields", "renamed", "code", "expected"), cases(__file__, "REFUSED"))
def test_what_is_no_such_adapter_is_refused_by_name(
    small: Path, fields: Any, renamed: Any, code: str, expected: str
) -> None:
    """Nothing is dropped in silence, and what a file says is checked as a config is."""
    fields = {name: value for name, value in (WRITTEN | fields).items() if value is not None}
    convert(small, "other/a.gguf", fields=fields, renamed=renamed)
    with pytest.raises(AdapterInvalid) as refusal:
        bundles(small, "other")
    found = [(each.code, f"{each.where} {each.found}") for each in refusal.value.findings]
    assert [name for name, _ in found] == code.split()
    assert re.search(expected, found[0][1]), found


def test_a_type_that_the_converter_does_not_write_is_refused(tmp_path: Path) -> None:
    """Blocks of fewer bits are none of an adapter."""
    make(tmp_path, LlamaConfig(**SIZES), ["q_proj", "up_proj"], kind="Q4_0")
    with pytest.raises(AdapterInvalid) as refusal:
        bundles(tmp_path, "gguf")
    assert [(each.code, each.found) for each in refusal.value.findings] == [("E_DTYPE", "Q4_0")]


def test_damaged_files_and_several_are_refused(small: Path) -> None:
    """A file that is cut off, bytes of no GGUF, a model, and two files, of which none is named."""
    convert(small, "whole/a.gguf")
    whole = (small / "whole" / "a.gguf").read_bytes()
    for name, content in {"cut": whole[:-40], "other": b"x", "twice": whole}.items():
        (small / name).mkdir(exist_ok=True)
        (small / name / "a.gguf").write_bytes(content)
    (small / "twice" / "b.gguf").write_bytes(whole)
    with pytest.raises(AdapterInvalid) as refusal:
        bundles(small, "cut", "other", "twice")
    found = [(each.adapter, each.code, each.found) for each in refusal.value.findings]
    assert [each[:2] for each in found] == [
        ("cut", "E_BAD_WEIGHTS"), ("other", "E_BAD_WEIGHTS"), ("twice", "E_CONTAINER"),
    ]  # fmt: skip
    assert "Is the download complete?" in found[0][2]


def test_an_adapter_is_named_by_its_file_and_is_no_base(small: Path) -> None:
    """A file stands for an adapter as it does for a base; an adapter as a base is refused with the cure."""
    convert(small, "one.gguf")
    peft, gguf = bundles(small, "peft", "one.gguf")
    assert peft == gguf
    (small / "linked.gguf").symlink_to((small / "one.gguf").rename(small / "2f5e"))  # as the hub's cache has it
    named = parse_repository(str(small / "linked.gguf"))
    assert bundles(small, "linked.gguf") == [peft]
    assert named.repo == str(small / "linked.gguf")
    (small / "2f5e").rename(small / "one.gguf")
    with pytest.raises(CheckpointInvalid, match=r"It is an adapter of llama\.cpp: name it as one"):
        run_build(
            deployment_of(small, "peft", checkpoint_repository=local_source(small / "one.gguf")),
            context_of(small),
        )


def test_a_fix_writes_the_original(small: Path, tmp_path: Path) -> None:
    """`check --fix` turns a file of llama.cpp into PEFT's, with the same values."""
    convert(small, "fixed/a.gguf")
    build = deployment_of(small, "fixed").build
    done = fix_one(build, context_of(small), Progress(build.lora_adapters), tmp_path / "out")
    assert done.changes[0] == "GGUF written out as LoRA of rank 4"
    written, original = (
        load_file(each / "adapter_model.safetensors") for each in (tmp_path / "out", small / "peft")
    )
    assert written.keys() == original.keys()
    assert all(np.array_equal(written[name], original[name]) for name in written)


def test_invocation_tokens_are_those_of_the_file(small: Path) -> None:
    """An activated adapter stays one; tokens that the base lacks are refused as those of a config are."""
    tokens = "adapter.alora.invocation_tokens"
    convert(small, "called/a.gguf", fields=WRITTEN | {tokens: [5, 6]})
    built = run_build(deployment_of(small, "called"), context_of(small))
    assert built.bundle("called").manifest.invocation_tokens == (5, 6)
    convert(small, "called/a.gguf", fields=WRITTEN | {tokens: [5, 99]})
    with pytest.raises(AdapterInvalid, match="called: 1 rule broken"):
        bundles(small, "called")
