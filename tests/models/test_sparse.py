"""Sparse vectors of texts, as SPLADE makes them by masked language modelling, against transformers and PEFT."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from loramux_shared.bases.read import read_config
from loramux_shared.bases.splade import SPLADE
from loramux_shared.faults import CheckpointInvalid
from tests.contract.http.test_scores import save_random
from tests.models.test_encoders import FAMILIES, PROMPTS, SIZES, write_base
from tests.support.openai_api import assert_close, open_api
from tests.support.tiny import World

SPARSE: dict[str, Any] = {
    "bert": FAMILIES["bert"],
    "roberta": FAMILIES["roberta"],
    "distilbert": transformers.DistilBertConfig(
        vocab_size=SIZES["vocab_size"],
        dim=48,
        hidden_dim=80,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=66,
        initializer_range=0.3,
    ),
    "mpnet": transformers.MPNetConfig(**SIZES),
    "gte": transformers.GteConfig(**SIZES),
    "nomic": transformers.NomicBertConfig(**SIZES | {"initializer_range": 0.1}),
    "jina": transformers.JinaEmbeddingsV3Config(**SIZES),
    "modern": transformers.ModernBertConfig(**SIZES, classifier_bias=True, norm_bias=True),
}


TARGETS = {
    "bert": ["query", "output.dense"],
    "roberta": ["value"],
    "distilbert": ["q_lin"],
    "mpnet": ["attn.q"],
    **{family: ["q_proj", "o_proj"] for family in ("gte", "nomic", "jina")},
    "modern": ["Wqkv", "mlp.Wo"],
}
LOGS = {"bert": "log1p_relu"}
"""Activations other than relu."""


@pytest.mark.parametrize("family", SPARSE)
async def test_sparse_vectors_as_splade_makes_them(tmp_path: Path, family: str) -> None:
    """A weight is the largest logit of masked language modelling over the tokens of a text."""
    base, activation = tmp_path / "base", LOGS.get(family, "relu")
    torch.manual_seed(0)
    write_base(transformers.AutoModelForMaskedLM.from_config(SPARSE[family]), base)
    (base / SPLADE).parent.mkdir()
    (base / SPLADE).write_text(json.dumps({"pooling_strategy": "max", "activation_function": activation}))
    masked = transformers.AutoModelForMaskedLM.from_pretrained
    lora = LoraConfig(r=3, target_modules=TARGETS[family])
    save_random(get_peft_model(masked(base, dtype=torch.float32), lora), tmp_path / "mine", 1)
    world = World(base, {"mine": tmp_path / "mine"}, tmp_path)
    async with open_api((world, world.built())) as api:
        for name in ("base", "mine"):
            model = masked(base, dtype=torch.float32).eval()
            if name == "mine":
                model = PeftModel.from_pretrained(model, tmp_path / "mine").eval()
            answer = await api.post("/embed_sparse", model=name, inputs=PROMPTS)
            assert answer.status_code == 200, answer.text
            for prompt, found in zip(PROMPTS, answer.json(), strict=True):
                with torch.no_grad():
                    expected = model(torch.tensor([prompt])).logits[0].relu().amax(0).log1p()
                expected = expected.log1p() if activation == "log1p_relu" else expected
                vector = np.zeros(len(expected), np.float32)
                vector[[each["index"] for each in found]] = [each["value"] for each in found]
                assert_close(vector, expected.numpy())
                assert len(found) == np.count_nonzero(vector)
        text = await api.post("/embed_sparse", inputs="abc", truncate=True)
        assert (
            text.json() == (await api.post("/embed_sparse", inputs=api.ready.service.text.encode("abc"))).json()
        )


@pytest.mark.parametrize(
    ("architecture", "fields", "part"),
    [
        ("BertModel", {}, "ForMaskedLM"),
        ("BertForMaskedLM", {"pooling_strategy": "sum"}, "expected max"),
        ("BertForMaskedLM", {"activation_function": "gelu"}, "relu or log1p_relu"),
    ],
)
def test_sparse_vectors_that_are_made_otherwise(
    tmp_path: Path, architecture: str, fields: dict[str, Any], part: str
) -> None:
    """A file that means something else is refused, with what is served."""
    config = SPARSE["bert"].to_dict() | {"architectures": [architecture]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / SPLADE).parent.mkdir()
    (tmp_path / SPLADE).write_text(json.dumps(fields))
    with pytest.raises(CheckpointInvalid, match=part):
        read_config(tmp_path)
