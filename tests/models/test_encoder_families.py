"""Encoders that differ from BERT in a part, with adapters, against transformers and PEFT in float32."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from inference_service.engine.layers.rope import frequencies
from loramux_shared.bases.read import read_fields
from loramux_shared.faults import CheckpointInvalid
from loramux_shared.runtime import Pooling
from tests.contract.http.test_scores import loaded, save_random
from tests.models.test_encoders import PROMPTS as LENGTHS, SIZES, adapt, means, write_base
from tests.support.cases import cases
from tests.support.openai_api import answer_of, assert_close, open_api
from tests.support.pooled import run_pooled
from tests.support.tiny import VOCAB, World

TENSORS = "adapter_model.safetensors"
PROMPTS = [*LENGTHS, [7, 1, 8]]
"""The last one has the token that has no position in an MPNet."""
DEBERTA = {
    "relative_attention": True,
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}
ODD = {
    "position_buckets": -1,
    "max_relative_positions": 20,
    "norm_rel_ebd": "none",
    "position_biased_input": True,
    "pooler_hidden_act": "tanh",
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
USUAL = SIZES | {"initializer_range": 0.1}
FAMILIES: dict[str, Any] = {
    "distilbert": transformers.DistilBertConfig(
        vocab_size=SIZES["vocab_size"],
        dim=48,
        hidden_dim=80,
        n_layers=3,
        n_heads=4,
        max_position_embeddings=66,
        activation="relu",
        initializer_range=0.1,
    ),
    "mpnet": transformers.MPNetConfig(**USUAL),
    "gte": transformers.GteConfig(**USUAL),
    "gte-untyped": transformers.GteConfig(**USUAL | {"type_vocab_size": 0, "rope_scaling": LINEAR}),
    "nomic": transformers.NomicBertConfig(**USUAL),
    "jina": transformers.JinaEmbeddingsV3Config(**USUAL, hidden_act="relu"),
    "deberta": transformers.DebertaV2Config(**(USUAL | DEBERTA | {"type_vocab_size": 0})),
    "deberta-odd": transformers.DebertaV2Config(**(USUAL | DEBERTA | ODD)),
}
MODULES: dict[str, tuple[list[str], list[str], str]] = {
    "distilbert": (["q_lin", "v_lin"], ["k_lin", "ffn.lin1", "q_lin"], "attention.out_lin"),
    "mpnet": (["q", "v"], ["k", "o", "intermediate.dense"], "output.dense"),
    **dict.fromkeys(
        ("gte", "gte-untyped", "nomic"), (["q_proj", "v_proj"], ["k_proj", "up_proj", "q_proj"], "gate_proj")
    ),
    "jina": (["q_proj", "v_proj"], ["k_proj", "fc1", "q_proj"], "o_proj"),
    "deberta": (["query_proj"], ["key_proj", "query_proj", "output.dense"], "key_proj"),
    "deberta-odd": (["value_proj"], ["key_proj"], "query_proj"),
}
"""Targets of three adapters of each family."""
HEAD = ["pre_classifier", "classifier"]
"""Layers that PEFT saves whole, and cannot adapt too."""


def adapters_of(family: str) -> dict[str, dict[str, Any]]:
    narrow, dora, biased = MODULES[family]
    return {
        "narrow": {"r": 4, "target_modules": narrow},
        "wide": {"r": 7, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"},
        "dora": {"r": 3, "use_dora": True, "target_modules": dora},
        "biased": {"r": 2, "lora_bias": True, "target_modules": [biased, *narrow]},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_equal_those_of_transformers(tmp_path: Path, family: str) -> None:
    """Base and adapters are computed in one batch, of texts of several lengths; bits do not depend on it."""
    base, adapters = tmp_path / "base", adapters_of(family)
    torch.manual_seed(0)
    write_base(transformers.AutoModel.from_config(FAMILIES[family]), base)
    world = adapt(base, adapters)
    store, expected = world.built(), means(world, PROMPTS)
    requests = [(model, prompt, Pooling.MEAN) for model in ("base", *adapters) for prompt in PROMPTS]
    for options in ({"native": False}, {"deterministic": True}):
        ready = world.load(store, max_batch_tokens=1024, **options)
        vectors, _ = run_pooled(ready, requests)
        assert_close(vectors, expected)
    for place in (1, 7, 14):
        assert (run_pooled(ready, [requests[place]])[0][0] == vectors[place]).all()


@pytest.mark.parametrize("family", FAMILIES)
async def test_heads_equal_those_of_transformers(tmp_path: Path, family: str) -> None:
    """The base's own head scores texts, and those of adapters texts and tokens."""
    base, config = tmp_path / "base", copy.deepcopy(FAMILIES[family])
    config.id2label = dict(enumerate("XYZ"))
    torch.manual_seed(0)
    write_base(transformers.AutoModelForSequenceClassification.from_config(config), base)
    kinds = {
        "topics": transformers.AutoModelForSequenceClassification,
        "tags": transformers.AutoModelForTokenClassification,
    }
    tasks = {"topics": "SEQ_CLS", "tags": "TOKEN_CLS"}
    wholes = {"base": loaded(base, 3).eval()}
    for seed, (name, kind) in enumerate(kinds.items()):
        settings = LoraConfig(task_type=tasks[name], r=3, target_modules="all-linear", exclude_modules=HEAD)
        made = get_peft_model(kind.from_pretrained(base, dtype=torch.float32), settings)
        save_random(made, tmp_path / name, seed)
        wholes[name] = PeftModel.from_pretrained(
            kind.from_pretrained(base, dtype=torch.float32), tmp_path / name
        ).eval()
    world = World(base, {name: tmp_path / name for name in kinds}, tmp_path)
    async with open_api((world, world.built())) as api:
        for name in ("base", "topics"):
            with torch.no_grad():
                expected = torch.cat([wholes[name](torch.tensor([ids])).logits for ids in PROMPTS])
            found = await answer_of(api, "/classify", model=name, input=PROMPTS, use_activation=False)
            assert_close([each["probs"] for each in found["data"]], expected)
        ids = await api.ready.service.text.encoded("a dog and a cat", 64, add_special_tokens=True)
        with torch.no_grad():
            shares, labels = wholes["tags"](torch.tensor([ids])).logits[0, 1:-1].softmax(-1).max(-1)
        body = {"model": "tags", "input": "a dog and a cat", "ignore_labels": []}
        [found] = (await answer_of(api, "/classify", **body))["data"]
        assert_close([each["score"] for each in found["entities"]], shares)
        assert [each["entity"] for each in found["entities"]] == [f"LABEL_{label}" for label in labels]


@pytest.mark.parametrize(("family", "field", "value"), cases(__file__, "SWITCHES"))
def test_switches_of_a_config_that_are_not_served_are_refused(family: str, field: str, value: Any) -> None:
    """A switch that would change vectors is named."""
    config = FAMILIES[family]
    fields = config.to_dict() | {
        "architectures": [transformers.AutoModel.from_config(config).__class__.__name__]
    }
    assert read_fields(fields).encodes
    with pytest.raises(CheckpointInvalid, match=field):
        read_fields(fields | {field: value})


QKV = [f"self_attn.{each}_proj" for each in "qkv"]
OF_CODE: dict[str, tuple[str, dict[str, list[str]]]] = {
    "gte": (
        "encoder.layer",
        {"attention.qkv_proj": QKV, "mlp.up_gate_proj": ["mlp.up_proj", "mlp.gate_proj"]},
    ),
    "nomic": ("encoder.layers", {"attn.Wqkv": QKV, "mlp.fc12": ["mlp.gate_proj"]}),
    "jina": ("encoder.layers", {"mixer.Wqkv": QKV, "mixer.out_proj": ["self_attn.o_proj"]}),
}
"""Names of layers and linears in the code that came with a family, with those of transformers."""


@pytest.mark.parametrize("family", OF_CODE)
def test_adapters_of_the_code_that_came_with_a_family(tmp_path: Path, family: str) -> None:
    """An adapter of a linear that is several in transformers is that of several which share their A."""
    base, [layers, modules] = tmp_path / "base", OF_CODE[family]
    torch.manual_seed(0)
    write_base(transformers.AutoModel.from_config(FAMILIES[family]), base)
    targets = [each for usual in modules.values() for each in usual]
    world = adapt(base, {"several": {"r": 3, "use_dora": True, "target_modules": targets}})
    several, one = tmp_path / "several", tmp_path / "one"
    tensors, packed = load_file(several / TENSORS), {}
    for index in range(SIZES["num_hidden_layers"]):
        for own, usual in modules.items():
            parts = [f"base_model.model.layers.{index}.{each}." for each in usual]
            to = f"base_model.model.{layers}.{index}.{own}."
            packed[f"{to}lora_A.weight"] = first = tensors[f"{parts[0]}lora_A.weight"]
            tensors |= {f"{part}lora_A.weight": first.clone() for part in parts}
            for kind in ("lora_B.weight", "lora_magnitude_vector"):
                packed[to + kind] = torch.cat([tensors[part + kind] for part in parts])
    save_file(tensors, several / TENSORS)
    one.mkdir()
    save_file(packed, one / TENSORS)
    config = json.loads((several / "adapter_config.json").read_text())
    (one / "adapter_config.json").write_text(json.dumps(config | {"target_modules": [*modules]}))
    expected = means(world, PROMPTS)[len(PROMPTS) :]
    world = World(base, {"several": several, "one": one}, tmp_path)
    requests = [(model, prompt, Pooling.MEAN) for model in world.adapters for prompt in PROMPTS]
    vectors, _ = run_pooled(world.load(world.built()), requests)
    assert_close(vectors, torch.cat([expected, expected]))


def test_scaling_of_the_code_that_came_with_gte() -> None:
    """Base and frequencies are scaled by powers of the factor, whatever the length of a text."""
    fields = FAMILIES["gte"].to_dict() | {
        "architectures": ["NewModel"],
        "model_type": "new",
        "rope_parameters": None,
        "rope_scaling": {"type": "ntk", "factor": 8.0},
        "rope_theta": 20_000,
    }
    [rope] = read_fields(fields).ropes
    expected = [1 / (160_000.0 ** (2 * pair / 12) * 8 ** (2 / 12)) for pair in range(6)]
    assert frequencies(rope).tolist() == pytest.approx(expected)
    with pytest.raises(CheckpointInvalid, match="rope scaling 'ntk' is not supported"):
        read_fields(fields | {"architectures": ["GteModel"], "model_type": "gte"})


def test_the_config_of_nomic_means_what_transformers_has() -> None:
    """Keys of the code that came with it count; texts are as long as those of its training."""
    own = {
        "architectures": ["NomicBertModel"],
        "model_type": "nomic_bert",
        "n_embd": 48,
        "n_head": 4,
        "n_inner": 80,
        "n_layer": 3,
        "n_positions": 8192,
        "max_trained_positions": 66,
        "layer_norm_epsilon": 1e-12,
        "rotary_emb_base": 1000,
        "activation_function": "swiglu",
        "type_vocab_size": 2,
        "vocab_size": VOCAB,
        "rotary_scaling_factor": 2,
    }
    usual = {**FAMILIES["nomic"].to_dict(), "architectures": ["NomicBertModel"]}
    assert replace(read_fields(own), dtype="") == replace(read_fields(usual), dtype="")
    for key, value in cases(__file__, "NOMIC"):
        with pytest.raises(CheckpointInvalid, match=key):
            read_fields(own | {key: value})
