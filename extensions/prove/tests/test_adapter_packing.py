"""Adapters are proved beside the steps, once, before anything of them is handed out."""

from unittest.mock import MagicMock

import numpy as np
import pytest
from structlog.testing import capture_logs

from inference_service.adapters.loader import AdapterLoader, Packer
from inference_service.adapters.reading import BundleReader
from inference_service.engine.lora.slots import Slots
from inference_service.engine.models.checkpoint import Checkpoint
from inference_service.engine.models.decoder import Decoder
from inference_service.startup.choose import choose_backend
from loramux_shared.bases.read import read_config
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.faults import ProofFailed
from loramux_shared.settings import InferenceSettings
from loramux_shared.storage.memory import MemoryStore
from tests.support.native import reuse_native
from tests.support.stores.bundles import Loaded, load
from tests.support.tiny import World, make_world
from tests.test_proof import build_into


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, MemoryStore]:
    """A tiny Llama with three adapters and their proofs."""
    world, store = make_world(tmp_path_factory.mktemp("tiny")), MemoryStore()
    build_into(store, world)
    return world, store


@pytest.fixture(params=["native", "torch"])
def loader_of(request, world):
    base = world[0].base
    config = read_config(base)
    settings = InferenceSettings(deployment="tiny", dtype="float32", backend=request.param, device="cpu")
    with reuse_native():
        backend = choose_backend(settings, config)
    model = Decoder(config, Checkpoint(base, backend.dtype, backend.device), backend.operations)
    made = []

    def make(store, max_rank=1):
        packer = Packer(model, backend.new_lora(), backend.new_lora, 16, max_rank)
        made.append(AdapterLoader(BundleReader(store, None), packer))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def digest_of(store, name):
    """The digest of an adapter of the current generation."""
    return current_generation(store, "tiny").adapters[name].digest


def test_an_adapter_is_proved_once(world, loader_of):
    """Loads replay its proof until it passes, and later ones do not; all are packed alike."""
    store = world[1]
    loader, digest = loader_of(store), digest_of(store, "all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Packer, "prove", MagicMock(side_effect=ProofFailed("it answers otherwise")))
        assert [type(load(loader, digest)) for _ in range(2)] == [ProofFailed] * 2
    with capture_logs() as logs:
        first, second = load(loader, digest), load(loader, digest)
    assert isinstance(first, Loaded)
    assert isinstance(second, Loaded)
    assert first.packed.matrices.equal(second.packed.matrices)
    assert np.array_equal(first.packed.table, second.packed.table)
    assert np.array_equal(first.packed.ranks, second.packed.ranks)
    assert np.array_equal(first.packed.linears, second.packed.linears)
    assert [line["adapter"] for line in logs if line["event"] == "adapter passed its proof"] == [digest[:12]]


def test_proofs_are_of_the_rank_that_the_bank_was_opened_for(world, loader_of, monkeypatch):
    """Tiles follow that rank: a kernel of another one would be compiled while others are served."""
    opened = []

    def note(slots, num_bytes, max_rank, num_slots, host_bytes=0):
        opened.append(max_rank)
        return opens(slots, num_bytes, max_rank, num_slots, host_bytes)

    opens = Slots.open
    monkeypatch.setattr(Slots, "open", note)
    loader = loader_of(world[1], max_rank=64)
    for name in ("all", "rs", "wide"):
        assert isinstance(load(loader, digest_of(world[1], name)), Loaded)
    assert opened == [64, 64, 64]
