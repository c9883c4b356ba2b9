import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from builder_service.domain.tensor_names import LoraKey, nearest_key, parse_key
from builder_service.pipeline.base_weights import BaseWeights
from loramux_shared.bundle.manifest import Manifest
from loramux_shared.faults import AdapterInvalid, BundleCorrupt, CheckpointInvalid
from loramux_shared.sources.checkpoint import describe_base
from loramux_shared.sources.open import open_sources
from tests.support.adapters import HIDDEN, VOCAB, tensors, write_adapter, write_base
from tests.support.cases import cases
from tests.support.folders import context_of, deployment_of, local_repository, run_build

EMBED = "base_model.model.model.embed_tokens.weight"
HEAD = "base_model.model.lm_head.weight"
INDEX = "model.safetensors.index.json"


def matrix(seed: int) -> Any:
    return np.random.default_rng(seed).normal(size=(VOCAB, HIDDEN)).astype(ml_dtypes.bfloat16)


def sharded_base(folder: Path) -> None:
    """A base in two shards: embeddings in the first, the head in the second."""
    write_base(folder / "base")
    (folder / "base" / "model.safetensors").unlink()
    shards = {"model.embed_tokens.weight": matrix(1), "lm_head.weight": matrix(2)}
    for number, (name, value) in enumerate(shards.items(), 1):
        save_file({name: value}, folder / "base" / f"model-{number:05d}-of-00002.safetensors")
    table = {name: f"model-{number:05d}-of-00002.safetensors" for number, name in enumerate(shards, 1)}
    (folder / "base" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))


def manifest_of(folder: Path) -> Manifest:
    return run_build(deployment_of(folder, "one"), context_of(folder)).bundle().manifest


def test_tied_matrices_of_two_values_are_refused(tmp_path):
    """Embeddings and head of a tied base that the config does not name are one matrix to PEFT."""
    write_base(tmp_path / "base", tie_word_embeddings=True)
    head = np.zeros((VOCAB, HIDDEN), np.float32)
    head[3] = 1
    write_adapter(tmp_path / "one", {**tensors(), EMBED: 2 * head, HEAD: head})
    with pytest.raises(AdapterInvalid, match=r"E_EMBED.*two matrices that differ"):
        manifest_of(tmp_path)
    write_adapter(tmp_path / "one", {**tensors(), EMBED: head, HEAD: head})
    assert [(part.module, part.tokens) for part in manifest_of(tmp_path).replaced] == [
        ("embedding", ((3, 1),)),
        ("head", ((3, 1),)),
    ]


def test_nothing_is_compared_with_a_base_that_changed(tmp_path):
    """A shard that is not the recorded one any more proves nothing."""
    sharded_base(tmp_path)
    sources = open_sources(local_roots=[tmp_path])
    base = describe_base(sources, local_repository(tmp_path / "base")).record
    weights = BaseWeights(base, sources, tmp_path / "cache", lambda _: None)
    assert weights.find("lm_head.weight") is not None
    assert weights.find("model.norm.weight") is None
    save_file({"model.embed_tokens.weight": matrix(3)}, tmp_path / "base" / "model-00001-of-00002.safetensors")
    with pytest.raises(BundleCorrupt, match=r"model-00001-of-00002\.safetensors changed while the build ran"):
        weights.find("model.embed_tokens.weight")


def test_a_base_shard_that_is_no_safetensors_file(tmp_path):
    """A base that cannot be read is named as such, not the adapter."""
    sharded_base(tmp_path)
    (tmp_path / "base" / "model-00002-of-00002.safetensors").write_bytes(b"x" * 100)
    sources = open_sources(local_roots=[tmp_path])
    base = describe_base(sources, local_repository(tmp_path / "base")).record
    with pytest.raises(CheckpointInvalid, match=r"base: model-00002-of-00002\.safetensors: header of"):
        BaseWeights(base, sources, tmp_path / "cache", lambda _: None).find("lm_head.weight")


@pytest.mark.parametrize("key", cases(__file__, "test_the_nearest_known_form_of_a_key"))
def test_the_nearest_known_form_of_a_key(key):
    """A key that lacks its root or its end is refused with the key that it should be."""
    near = nearest_key(key)
    assert not isinstance(parse_key(key), LoraKey)
    assert isinstance(parse_key(near), LoraKey)
    assert ".3." in near
    assert nearest_key("something.else") == ""


@pytest.mark.parametrize(("linear", "path"), [("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")])
def test_linears_of_mixtrals_experts_have_their_place(linear: str, path: str) -> None:
    """Adapters of transformers 4 name them as the checkpoint does."""
    name = f"base_model.model.model.layers.1.block_sparse_moe.experts.3.{linear}.lora_A.weight"
    key = parse_key(name, experts=True)
    assert isinstance(key, LoraKey)
    assert (key.layer, key.expert, key.path, key.side) == (1, 3, f"mlp.experts.{path}", "A")
