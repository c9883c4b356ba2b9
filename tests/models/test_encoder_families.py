"""Encoders that differ from BERT in a part, with adapters, against transformers and PEFT in float32."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from loramux_shared.bases.read import read_fields
from loramux_shared.faults import CheckpointInvalid
from loramux_shared.runtime import Pooling
from tests.contract.http.test_scores import loaded, save_random
from tests.models.test_encoders import PROMPTS as LENGTHS, SIZES, adapt, means, write_base
from tests.support.cases import cases
from tests.support.openai_api import answer_of, assert_close, open_api
from tests.support.pooled import run_pooled
from tests.support.tiny import World

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
    "deberta": transformers.DebertaV2Config(**(USUAL | DEBERTA | {"type_vocab_size": 0})),
    "deberta-odd": transformers.DebertaV2Config(**(USUAL | DEBERTA | ODD)),
}
MODULES: dict[str, tuple[list[str], list[str], str]] = {
    "distilbert": (["q_lin", "v_lin"], ["k_lin", "ffn.lin1", "q_lin"], "attention.out_lin"),
    "mpnet": (["q", "v"], ["k", "o", "intermediate.dense"], "output.dense"),
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
