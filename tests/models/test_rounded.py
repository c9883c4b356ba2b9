"""Bases whose linears are rounded to 8 and 4 bits at load: answers, adapters, and the setting."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from inference_service.adapters.follower import needs_restart
from inference_service.engine.kernels.integers import quantize
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.faults import DeploymentInvalid, SettingsInvalid
from loramux_shared.runtime import Rounding
from loramux_shared.storage.memory import MemoryStore
from tests.support.tiny import (
    VOCAB,
    Replica,
    World,
    make_world,
    next_logprobs,
    oracle,
    oracle_tokens,
    run_engine,
)

INTEGERS = ["int8", "int4"]
NEW = 12
PROMPTS = {"base": 3, "wide": 17, "all": 40, "rs": 9}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    return make_world(tmp_path_factory.mktemp("tiny"), **sizes)


def _built(world: World, changes: dict[str, Any], runtime: dict[str, Any]) -> MemoryStore:
    store = MemoryStore()
    world.build_with(store, build=changes, runtime=runtime)
    return store


def _requests() -> list[tuple[str, list[int]]]:
    return [(model, [(5 + 7 * place) % VOCAB for place in range(size)]) for model, size in PROMPTS.items()]


def _loaded(world: World, store: MemoryStore, **settings: object) -> tuple[Replica, dict[str, Any]]:
    with capture_logs() as logs:
        ready = world.load(store, **settings)
    return ready, next(entry for entry in logs if entry["event"] == "loaded")


def _rounded_oracle(world: World, adapter: Path | None, quantization: str) -> Any:
    """transformers and PEFT, with the weights of linears rounded as ours are and widened again."""
    model = oracle(world.base, adapter)
    for name, parameter in model.named_parameters():
        leaf = name.removesuffix(".weight").removesuffix(".base_layer").rpartition(".")[2]
        kind = Rounding(quantization)
        kind = kind.of_head if leaf == "lm_head" else kind
        if leaf.endswith("_proj") or leaf == "lm_head":
            found = quantize(parameter.detach(), kind)
            with torch.no_grad():
                parameter.copy_(found.widened())
    return model


@pytest.mark.parametrize("quantization", INTEGERS)
def test_answers_are_those_of_the_rounded_weights_token_for_token(
    world: World, store: MemoryStore, quantization: str
) -> None:
    """Base and adapters answer alike in float32 in a batch, compiled and by torch: nothing else is rounded."""
    expected = [
        oracle_tokens(_rounded_oracle(world, world.adapters.get(model), quantization), prompt, NEW)
        for model, prompt in _requests()
    ]
    for backend in ("auto", "torch"):
        ready, reported = _loaded(world, store, quantization=quantization, backend=backend, device="cpu")
        assert run_engine(ready, _requests(), NEW) == expected
        assert reported["weights"].startswith(f"{quantization}: ")


def test_answers_depend_on_nothing_around_them(world: World, store: MemoryStore) -> None:
    """LORAMUX_DETERMINISTIC with rounded weights: alone and together, the same log probabilities."""
    for quantization in INTEGERS:
        ready, _ = _loaded(world, store, quantization=quantization, dtype="bfloat16", deterministic=True)
        together = next_logprobs(ready, _requests())
        assert [next_logprobs(ready, [request])[0] for request in _requests()] == together


def test_the_deployment_says_it_and_a_replica_may_say_otherwise(world: World) -> None:
    """`runtime.quantization` reaches the replica, where LORAMUX_QUANTIZATION comes first; a change restarts."""
    store = _built(world, {}, {"quantization": "int8"})
    assert _loaded(world, store)[1]["weights"].startswith("int8: ")
    assert _loaded(world, store, quantization="none")[1]["weights"].startswith("float32: ")
    before, after = (current_generation(each, "tiny") for each in (_built(world, {}, {}), store))
    assert needs_restart(before, after) == "weights rounded to int8 instead of none"


def _alone(runtime: dict[str, Any], world: World) -> MemoryStore:
    adapters = world.deployment().model_dump(mode="json")["build"]["lora_adapters"]
    return _built(world, {"lora_adapters": {"all": adapters["all"]}}, {"serve_base": False} | runtime)


def test_an_adapter_is_not_merged_into_rounded_weights(world: World, store: MemoryStore) -> None:
    """An adapter stays beside rounded weights, as a merge would round the adapter too."""
    request: Sequence[tuple[str, list[int]]] = [("all", _requests()[2][1])]
    ready, reported = _loaded(world, _alone({}, world), quantization="int8")
    assert reported["merged"] == "none"
    beside, _ = _loaded(world, store, quantization="int8")
    assert run_engine(ready, request, NEW) == run_engine(beside, request, NEW)


def test_both_together_are_refused(world: World) -> None:
    """A replica refuses a setting of both, and the deployment's rules refuse a file with both."""
    with pytest.raises(SettingsInvalid, match=r"LORAMUX_QUANTIZATION=int8, but runtime\.merge .* is always"):
        world.load(_alone({"merge": "always"}, world), quantization="int8")
    data = world.deployment().model_dump(mode="json")
    data["build"]["lora_adapters"].popitem()
    data["build"]["lora_adapters"].popitem()
    data["runtime"] |= {"serve_base": False, "merge": "always", "quantization": "int4"}
    with pytest.raises(DeploymentInvalid, match=r"quantization: none where runtime\.merge is always"):
        parse_deployment(data)
