"""The served bases: every caller gets one answer."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from builder_service.pipeline.build import build
from builder_service.pipeline.check import check_one
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress
from loramux_shared.bases.families import load_families
from loramux_shared.bases.read import read_config, read_fields
from loramux_shared.deployment import Deployment
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.faults import CheckpointInvalid
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.support.adapters import write_adapter, write_base
from tests.support.examples import examples
from tests.support.hub_configs import HUB_CONFIGS

LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0]}
REFUSED: dict[str, dict[str, Any]] = {
    "Cohere": {"architectures": ["CohereForCausalLM"], "model_type": "cohere", "logit_scale": 0.0625},
    "GLM": {"architectures": ["GlmForCausalLM"], "model_type": "glm"},
    "OLMo": {"architectures": ["OlmoForCausalLM"], "model_type": "olmo"},
    "Mixtral": {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8},
    "three bits": {"quantization_config": {"quant_method": "gptq", "bits": 3}},
    "contradiction": {"model_type": "mistral"},
    "activation": {"hidden_act": "relu"},
    "rope": {"rope_scaling": {"rope_type": "axial"}},
    "long factors": {"rope_scaling": LONGROPE, "max_position_embeddings": 64},
    "no sizes": {"hidden_size": None},
}


def deployment_of(folder: Path, max_seq_len: int) -> Deployment:
    """A deployment of the adapter ``one``."""
    data = {
        "model_name": "tiny",
        "build": {
            "max_seq_len": max_seq_len,
            "checkpoint_repository": {"source": "LOCAL", "repo": str(folder / "base")},
            "lora_adapters": {"one": {"source": "LOCAL", "repo": str(folder / "one")}},
        },
    }
    return parse_deployment(data).deployment


@pytest.mark.parametrize("name", REFUSED)
def test_builder_and_replica_refuse_a_base_with_the_same_words(tmp_path: Path, name: str) -> None:
    """A check, a build and the start of a replica ask one reader; the weights are not even looked at."""
    write_base(tmp_path / "base", **{"original_max_position_embeddings": 32, **REFUSED[name]})
    (tmp_path / "base" / "model.safetensors").unlink()
    write_adapter(tmp_path / "one")
    with pytest.raises(CheckpointInvalid) as refused:
        read_config(tmp_path / "base", 48)
    store = MemoryStore()
    context = BuildContext(store, open_sources(local_roots=[tmp_path]), tmp_path / "work")
    with pytest.raises(CheckpointInvalid) as checked:
        check_one(deployment_of(tmp_path, 48), context, Progress(["one"]))
    with pytest.raises(CheckpointInvalid) as built:
        build(deployment_of(tmp_path, 48), context, Progress(["one"]))
    assert checked.value.message == refused.value.message
    assert built.value.message == f"base checkpoint: {refused.value.message}"
    assert store.objects == {}


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from([0, 1, -1, 7, 1 << 31, 10**400, 0.0, -0.5, 1e-320, float("inf"), float("nan")]),
        st.sampled_from(["", "yarn", "longrope", "full_attention", "float32", "\ud800"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["rope_type", "factor", "full_attention", "short_factor", "rope_theta"]), inner
        ),
    ),
    max_leaves=4,
)
KEYS = sorted({key for config in HUB_CONFIGS.values() for key in (*config, *(config.get("text_config") or ()))})
MORE = ("rope_parameters", "layer_types", "quantization_config", "dtype", "per_layer_config", "attention_bias")


@settings(max_examples=examples(80), derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    base=st.sampled_from(sorted(HUB_CONFIGS)),
    change=st.dictionaries(st.sampled_from([*KEYS, *MORE]), VALUES, max_size=3),
    inside=st.dictionaries(st.sampled_from([*KEYS, *MORE]), VALUES, max_size=2),
    generation=st.dictionaries(st.just("eos_token_id"), VALUES),
    longest=st.sampled_from([None, 1, 10**9]),
)
def test_no_config_is_worse_than_refused(
    base: str, change: dict[str, Any], inside: dict[str, Any], generation: dict[str, Any], longest: int | None
) -> None:
    """Any value under any key is read or refused by name; nothing else is raised, and nothing takes long."""
    config = HUB_CONFIGS[base] | change
    if isinstance(config.get("text_config"), dict):
        config = config | {"text_config": config["text_config"] | inside}
    with suppress(CheckpointInvalid):
        assert read_fields(config, generation, longest).architecture in load_families()
