"""Rope in all places of a config: the frequencies are those that transformers computes from the file."""

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings, strategies as st
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import Gemma2RotaryEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding
from transformers.models.granite.modeling_granite import GraniteRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.ministral3.modeling_ministral3 import Ministral3RotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.olmo2.modeling_olmo2 import Olmo2RotaryEmbedding
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.smollm3.modeling_smollm3 import SmolLM3RotaryEmbedding

from inference_service.layers.rope import frequencies
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.read import read_config
from loramux_shared.faults import CheckpointInvalid
from loramux_shared.storage.memory import MemoryStore
from tests.support.examples import SWEEPING, examples, spread
from tests.support.tiny import SIZES, VOCAB, World, make_checkpoint, oracle, oracle_tokens, run_engine

ROTARY = {
    "llama": ("LlamaForCausalLM", LlamaRotaryEmbedding),
    "mistral": ("MistralForCausalLM", MistralRotaryEmbedding),
    "qwen2": ("Qwen2ForCausalLM", Qwen2RotaryEmbedding),
    "qwen3": ("Qwen3ForCausalLM", Qwen3RotaryEmbedding),
    "gemma2": ("Gemma2ForCausalLM", Gemma2RotaryEmbedding),
    "gemma3_text": ("Gemma3ForCausalLM", Gemma3RotaryEmbedding),
    "gemma4_text": ("Gemma4ForCausalLM", Gemma4TextRotaryEmbedding),
    "phi3": ("Phi3ForCausalLM", Phi3RotaryEmbedding),
    "granite": ("GraniteForCausalLM", GraniteRotaryEmbedding),
    "smollm3": ("SmolLM3ForCausalLM", SmolLM3RotaryEmbedding),
    "olmo2": ("Olmo2ForCausalLM", Olmo2RotaryEmbedding),
    "olmo3": ("Olmo3ForCausalLM", Olmo3RotaryEmbedding),
    "gpt_oss": ("GptOssForCausalLM", GptOssRotaryEmbedding),
    "ministral3": ("Ministral3ForCausalLM", Ministral3RotaryEmbedding),
}
MAX_POSITIONS = 256
LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [4.0, 5.0, 6.0, 7.0]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BLOCKS: dict[str, dict[str, Any]] = {
    "yarn": YARN,
    "yarn-of-a-class": {"type": "yarn", "factor": 2.0, "rope_theta": 500.0},
    "yarn-mscale": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.4, "truncate": False, "beta_fast": 16},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "linear-by-type": {"type": "linear", "factor": 5.0},
    "two-types": {"rope_type": "linear", "type": "yarn", "factor": 5.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 64},
    "llama3-of-a-class": LLAMA3,
    "default": {"rope_type": "default", "rope_theta": 777.0},
    "theta": {"rope_theta": 888.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {"rope_type": "longrope", **LONG, "original_max_position_embeddings": 100},
    "su": {"type": "su", **LONG, "original_max_position_embeddings": 100},
    "old-yarn": {"type": "yarn", "factor": 2.0, **LONG},
    "proportional": {"rope_type": "proportional", "rope_theta": 2e6, "partial_rotary_factor": 0.25},
    "proportional-factor": {"rope_type": "proportional", "rope_theta": 2e4, "factor": 3.0},
}
OF_LAYERS = ("gemma3_text", "gemma4_text", "olmo3")
"""Families with a rope for each type of layers."""
NESTED = {"full_attention": BLOCKS["linear"], "sliding_attention": BLOCKS["default"]}


def blocks() -> st.SearchStrategy[dict[str, Any] | None]:
    """A block of rope, an empty one, or null."""
    return st.sampled_from([*BLOCKS.values(), {}, None])


def parameters() -> st.SearchStrategy[dict[str, Any] | None]:
    """Return the possible ``rope_parameters``: one block, or one per type of layers."""
    nested = st.dictionaries(st.sampled_from(["full_attention", "sliding_attention"]), blocks(), max_size=2)
    return st.one_of(blocks(), nested)


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "rope_scaling": blocks(),
        "rope_parameters": parameters(),
        "rope_theta": st.sampled_from([10000.0, 5000]),
        "rope_local_base_freq": st.sampled_from([20000.0]),
        "original_max_position_embeddings": st.sampled_from([20, 128]),
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for configs."""
    return tmp_path_factory.mktemp("rope")


def write(folder: Path, model_type: str, fields: Mapping[str, Any]) -> None:
    """Write the config of a small model of a family."""
    sizes = {**SIZES, "head_dim": 8, "pad_token_id": 0}
    sizes |= {"model_type": model_type, "architectures": [ROTARY[model_type][0]]}
    (folder / "config.json").write_text(json.dumps({**sizes, **fields}))


def transformers_ropes(folder: Path, long: bool) -> dict[str, tuple[torch.Tensor, float]] | None:
    """Frequencies and magnitude by the type of layers; None where transformers refuses the file."""
    try:
        config = AutoConfig.from_pretrained(folder)
        rotary = ROTARY[config.model_type][1](config)
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
    for layer in model.layers:
        kind = "full_attention" if layer.mixer.attention.window is None else "sliding_attention"
        kind = kind if model.architecture in [ROTARY[name][0] for name in OF_LAYERS] else ""
        ropes[kind] = (frequencies(layer.mixer.rope), layer.mixer.rope.scaling.magnitude)
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ROTARY)
@settings(max_examples=examples(10), derandomize=True, suppress_health_check=list(HealthCheck))
@given(fields=FIELDS)
def test_rope_is_read_as_transformers_reads_it(folder: Path, model_type: str, fields: dict[str, Any]) -> None:
    """A config that both take has the same frequencies, in every family and every place, and in places
    together.
    """
    write(folder, model_type, fields)
    compare(folder)


def _places() -> dict[str, tuple[str, dict[str, Any]]]:
    """Configs that people write, which must be served."""
    generic = [name for name in ROTARY if name not in ("phi3", *OF_LAYERS, "ministral3")]
    cases: dict[str, tuple[str, dict[str, Any]]] = {}
    for family in generic:
        for name in ("yarn", "yarn-of-a-class", "linear", "linear-by-type", "llama3", "longrope"):
            cases[f"{family}-scaling-{name}"] = (family, {"rope_scaling": BLOCKS[name]})
            cases[f"{family}-parameters-{name}"] = (family, {"rope_parameters": BLOCKS[name]})
            both = {"rope_scaling": BLOCKS[name], "rope_parameters": BLOCKS["default"]}
            cases[f"{family}-both-{name}"] = (family, both)
            outside = {"original_max_position_embeddings": 20}
            cases[f"{family}-outside-{name}"] = (family, {"rope_parameters": BLOCKS[name]} | outside)
        cases[f"{family}-empty"] = (family, {"rope_scaling": {}, "rope_parameters": YARN})
        cases[f"{family}-null"] = (family, {"rope_scaling": None, "rope_parameters": YARN, "rope_theta": 50.0})
    for name in ("longrope", "su", "old-yarn"):
        for place in ("rope_scaling", "rope_parameters"):
            cases[f"phi3-{place}-{name}"] = ("phi3", {place: BLOCKS[name]})
            outside = {"original_max_position_embeddings": 64}
            cases[f"phi3-outside-{place}-{name}"] = ("phi3", {place: BLOCKS[name]} | outside)
        both = {"rope_scaling": BLOCKS[name], "rope_parameters": BLOCKS["default"]}
        cases[f"phi3-both-{name}"] = ("phi3", both)
    for name in ("yarn", "yarn-of-a-class", "yarn-mscale", "llama3"):
        block = BLOCKS[name] | {"llama_4_scaling_beta": 0.1}
        cases[f"ministral3-scaling-{name}"] = ("ministral3", {"rope_scaling": block})
        cases[f"ministral3-parameters-{name}"] = ("ministral3", {"rope_parameters": block})
    cases["ministral3-of-a-class"] = ("ministral3", {})
    cases["gpt_oss-of-a-class"] = ("gpt_oss", {})
    cases["gpt_oss-theta-of-a-class"] = ("gpt_oss", {"rope_theta": 5000.0})
    for name in ("linear", "linear-by-type", "yarn", "llama3"):
        cases[f"olmo3-scaling-{name}"] = ("olmo3", {"rope_scaling": BLOCKS[name], "rope_theta": 3000.0})
        cases[f"olmo3-nested-{name}"] = ("olmo3", {"rope_parameters": {"full_attention": BLOCKS[name]}})
        cases[f"gemma3-scaling-{name}"] = ("gemma3_text", {"rope_scaling": BLOCKS[name]})
        both = {"rope_scaling": BLOCKS[name], "rope_parameters": NESTED}
        cases[f"gemma3-both-{name}"] = ("gemma3_text", both)
        one = {"rope_parameters": {"full_attention": BLOCKS[name]}, "rope_local_base_freq": 20000.0}
        cases[f"gemma3-nested-{name}"] = ("gemma3_text", one)
    for name in ("linear", "proportional", "proportional-factor"):
        nested = {"full_attention": {"rope_theta": 1e5} | BLOCKS[name], "sliding_attention": BLOCKS["default"]}
        cases[f"gemma4-nested-{name}"] = ("gemma4_text", {"rope_parameters": nested})
    cases["gemma4-of-a-class"] = ("gemma4_text", {})
    cases["gemma3-flat"] = ("gemma3_text", {"rope_parameters": BLOCKS["linear"], "rope_theta": 3000.0})
    return cases


PLACES = _places()


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


SOME = ("qwen2-both-yarn", "llama-both-llama3", "phi3-rope_parameters-longrope", "gemma3-both-linear")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PLACES if os.environ.get(SWEEPING) else SOME)
def test_tokens_follow_the_rope_of_transformers(tmp_path: Path, name: str) -> None:
    """Greedy tokens in float32 of a prompt that is long enough for the scaling to matter."""
    model_type, fields = PLACES[name]
    write(tmp_path, model_type, {"initializer_range": 0.3})
    config = AutoConfig.from_pretrained(tmp_path)
    make_checkpoint(tmp_path / "base", config)
    write(tmp_path / "base", model_type, {"num_hidden_layers": config.num_hidden_layers, **fields})
    draw = random.Random(3)
    prompt = [draw.randrange(3, VOCAB) for _ in range(15)]
    expected = oracle_tokens(oracle(tmp_path / "base", None), prompt, 4)
    world, store = World(tmp_path / "base", {}, tmp_path), MemoryStore()
    world.build(store)
    assert run_engine(world.load(store), [("base", prompt)], 4) == [expected]
