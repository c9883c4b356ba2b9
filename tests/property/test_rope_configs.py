"""Rope in all places of a config: the frequencies are those that transformers computes from the file."""

import json
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from inference_service.engine.layers.rope import frequencies
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.read import read_config
from loramux_shared.faults import CheckpointInvalid
from tests.support.cases import cases
from tests.support.examples import spread
from tests.support.tiny import SIZES

FAMILIES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2",
    "gemma3_text": "Gemma3", "gemma4_text": "Gemma4", "phi3": "Phi3", "granite": "Granite",
    "smollm3": "SmolLM3", "olmo2": "Olmo2", "olmo3": "Olmo3", "gpt_oss": "GptOss", "ministral3": "Ministral3",
}  # fmt: skip
"""The first part of the names of a family's classes, by the type of its models."""
MAX_POSITIONS = 256
BLOCKS: dict[str, dict[str, Any]] = cases(__file__, "BLOCKS")
OF_LAYERS = ("gemma3_text", "gemma4_text", "olmo3")
"""Families with a rope for each type of layers."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rope")


def write(folder: Path, model_type: str, fields: Mapping[str, Any]) -> None:
    sizes = {**SIZES, "head_dim": 8, "pad_token_id": 0}
    sizes |= {"model_type": model_type, "architectures": [f"{FAMILIES[model_type]}ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**sizes, **fields}))


def rotary_of(model_type: str) -> Any:
    """Return the class of transformers that computes the frequencies of a family."""
    family = model_type.removesuffix("_text")
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    [found] = {
        each for name, each in vars(module).items() if re.fullmatch(r"\w+(?<!Vision)RotaryEmbedding", name)
    }
    return found


def transformers_ropes(folder: Path, long: bool) -> dict[str, tuple[torch.Tensor, float]] | None:
    """Frequencies and magnitude by the type of layers; None where transformers refuses the file."""
    try:
        config = AutoConfig.from_pretrained(folder)
        rotary = rotary_of(config.model_type)(config)
        if config.model_type in OF_LAYERS:
            return {
                kind: (getattr(rotary, f"{kind}_inv_freq"), getattr(rotary, f"{kind}_attention_scaling"))
                for kind in rotary.layer_types
            }
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, StrictDataclassError):
        return None
    if rotary.rope_type == "longrope" and long:
        return {"": ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=MAX_POSITIONS)}
    return {"": (rotary.inv_freq, rotary.attention_scaling)}


def our_ropes(model: ModelConfig) -> dict[str, tuple[torch.Tensor, float]]:
    """The same, as a replica computes them."""
    ropes = {}
    for mixer in model.attentions:
        kind = "full_attention" if mixer.attention.window is None else "sliding_attention"
        kind = kind if model.architecture in [f"{FAMILIES[name]}ForCausalLM" for name in OF_LAYERS] else ""
        ropes[kind] = (frequencies(mixer.rope), mixer.rope.scaling.magnitude)
    return ropes


def compare(folder: Path) -> bool:
    """Compare both readings of a folder, for short and long deployments; False where one refuses."""
    for max_seq_len in (None, MAX_POSITIONS):
        expected = transformers_ropes(folder, long=max_seq_len is not None)
        try:
            found = our_ropes(read_config(folder, max_seq_len))
        except CheckpointInvalid:
            return False
        if expected is None:
            return False
        assert found.keys() == expected.keys()
        for kind, (freqs, magnitude) in expected.items():
            torch.testing.assert_close(found[kind][0], freqs, rtol=1e-6, atol=0, msg=kind)
            assert found[kind][1] == pytest.approx(magnitude, rel=1e-6)
    return True


def _filled(value: Any, name: str) -> Any:
    """Put blocks for their names, and for ``EACH`` the one of this name; one without a field is merged."""
    if isinstance(value, str):
        return BLOCKS[name if value == "EACH" else value]
    if not isinstance(value, dict):
        return value
    made: dict[str, Any] = {}
    for field, each in value.items():
        made |= {field: _filled(each, name)} if field else _filled(each, name)
    return made


PLACES = {
    f"{family.removesuffix('_text')}-{place}-{name}".rstrip("-"): (family, _filled(fields, name))
    for families, names, places in cases(__file__, "PLACES")
    for family in families
    for name in names
    for place, fields in places.items()
}
"""Configs that people write, which must be served."""


@pytest.mark.filterwarnings("ignore")
def test_no_place_that_people_use_is_refused(folder: Path) -> None:
    """Every family, every scaling, every place: transformers takes the file, and so do we, with one rope."""
    refused = []
    for name in spread([*PLACES], 100):
        model_type, fields = PLACES[name]
        write(folder, model_type, fields)
        if not compare(folder):
            refused.append(name)
    assert refused == []
