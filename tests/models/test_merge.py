"""A deployment of one adapter that hides its base: merged into the weights, and the same to a client."""

import re
import weakref
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from inference_service.engine.models.checkpoint import Checkpoint
from inference_service.engine.models.decoder import Decoder, Layer
from loramux_shared.bases.read import read_config
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.faults import DeploymentInvalid, ModelNotFound
from loramux_shared.storage.memory import MemoryStore
from tests.support.tiny import Replica, World, make_world, run_engine
from tests.support.weights import adapter_of

PROMPTS = [[5 + 7 * turn + place for place in range(3 + 11 * turn)] for turn in range(5)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("tiny"))


def ready_of(world: World, name: str, runtime: dict[str, object], **settings: object) -> Replica:
    store = MemoryStore()
    replace(world, adapters={name: world.adapters[name]}).build_with(store, runtime=runtime)
    merged = "merge" not in runtime and not runtime.get("serve_base", True)
    assert current_generation(store, "tiny").merged == (name if merged else None)
    return world.load(store, **settings)


@pytest.mark.parametrize("name", ["wide", "all", "rs"])
@pytest.mark.parametrize("native", [True, False])
def test_merged_and_unmerged_agree(world: World, name: str, native: bool) -> None:
    """Merged weights give in float32 the tokens that the adapter gives beside the base."""
    requests = [(name, prompt) for prompt in PROMPTS]
    merged = ready_of(world, name, {"serve_base": False}, native=native)
    beside = ready_of(world, name, {"serve_base": False, "merge": "never"}, native=native)
    assert merged.service.local.catalog.get(name).adapter is None
    assert beside.service.local.catalog.get(name).adapter is not None
    assert run_engine(merged, requests, 20) == run_engine(beside, requests, 20)


def test_a_hidden_base_is_unknown_to_clients(world: World) -> None:
    """The base's name is neither listed nor served; the adapter keeps digest and parent."""
    catalog = ready_of(world, "rs", {"serve_base": False}).service.local.catalog
    assert [model.name for model in catalog] == ["rs"]
    assert catalog.get("rs").digest
    with pytest.raises(ModelNotFound, match="Served: rs"):
        catalog.get("base")


class Watched:
    """A checkpoint that notes, before it gives a tensor of a layer, how many of the old layers still live."""

    def __init__(self, inner: Checkpoint, layers: Sequence[Layer]) -> None:
        self.dtype, self.device = inner.dtype, inner.device
        self.has, self.first = inner.has, inner.first
        self._inner = inner
        self._old = [weakref.ref(layer.mlp) for layer in layers]
        self.alive: dict[int, int] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        if found := re.search(r"layers\.(\d+)\.", name):
            self.alive[int(found[1])] = sum(ref() is not None for ref in self._old)
        return self._inner.get(name, shape, dtype)


def test_a_merge_holds_no_layer_twice(world: World) -> None:
    """The old ones are gone before anything is read: a file that holds them all is held meanwhile."""
    config = read_config(world.base)
    model = Decoder(config, Checkpoint(world.base, torch.float32, torch.device("cpu")))
    watched = Watched(Checkpoint(world.base, torch.float32, torch.device("cpu")), model.layers)
    rows = [
        (layer, module, torch.ones(1, group.in_features), torch.ones(out, 1))
        for layer in range(config.dims.num_layers)
        for group in config.groups
        for module, out in zip(group.modules, group.out_features, strict=True)
    ]
    model.merge(watched, adapter_of(rows, config.layer_groups))
    assert watched.alive == dict.fromkeys(range(config.dims.num_layers), 0)
    assert len(model.layers) == config.dims.num_layers


@pytest.mark.parametrize(
    "runtime", [{"serve_base": True, "merge": "always"}, {"serve_base": False, "merge": "sometimes"}]
)
def test_a_merge_that_cannot_be_is_refused(world: World, runtime: dict[str, object]) -> None:
    """merge: always beside a served base, and values that do not exist, are errors of the deployment file."""
    data = world.deployment().model_dump(mode="json")
    data["runtime"] |= runtime
    with pytest.raises(DeploymentInvalid, match=r"merge"):
        parse_deployment(data)
