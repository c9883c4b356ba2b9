"""The second reading of every family, format and kind of adapter: that of transformers with PEFT."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from loramux_prove.adapter_source import read_adapter
from loramux_prove.building import prove_adapters
from loramux_prove.reference import Reference, Run
from loramux_shared.bases.read import read_config
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.faults import AdapterInvalid, CheckpointInvalid
from loramux_shared.storage.memory import MemoryStore
from tests.models.test_families import CASES, PROVED
from tests.support import lowbit_files as lowbit
from tests.support.tiny import World, make_checkpoint, make_world, make_world_of, oracle
from tests.test_proof import build_into
from tests.unit.bases.test_base_weights import other_head, rewrite
from tests.unit.domain.test_disguised import make_saved

PROMPT = [5 + (index * 37) % 180 for index in range(60)]


def run(base: Path, world: World, max_seq_len: int | None = None) -> Run:
    """Answer the prompt with the adapter "all"."""
    config = read_config(base, max_seq_len)
    adapter = read_adapter(world.adapters["all"], config)
    [found] = Reference(config, base).run({"all": [PROMPT]}, {"all": adapter})["all"]
    return found


def expect_peft(world: World, max_seq_len: int | None = None) -> None:
    """The logits behind a prompt longer than any window are those of transformers with PEFT."""
    with torch.no_grad():
        expected = oracle(world.base, world.adapters["all"])(torch.tensor([PROMPT])).logits[0, -1]
    torch.testing.assert_close(run(world.base, world, max_seq_len).logits, expected, rtol=1e-3, atol=1e-3)


def proved(world: World) -> MemoryStore:
    """The adapters with proofs, built."""
    store = MemoryStore()
    build_into(store, world)
    return store


@pytest.mark.parametrize("name", PROVED)
def test_the_reference_is_transformers_and_peft(name: str, tmp_path: Path) -> None:
    """Every family without experts, fused or not."""
    case = CASES[name]
    world = make_world_of(tmp_path, case.config, {"all": case.adapters["all"]}, max_seq_len=case.max_seq_len)
    expect_peft(world, case.max_seq_len)


def test_an_activation_without_a_second_reading_is_refused(tmp_path: Path) -> None:
    """The refusal names the part of layers that is not written a second time."""
    make_checkpoint(tmp_path, CASES["arcee"].config)
    with pytest.raises(CheckpointInvalid, match="MLPs with an activation of their own"):
        Reference(read_config(tmp_path), tmp_path)


@pytest.mark.parametrize("kind", lowbit.KINDS)
def test_proofs_are_computed_with_the_widened_weights(kind: str, tmp_path: Path) -> None:
    """A replica that widens the weights can replay proofs of the widened weights."""
    world = make_world(tmp_path / "plain")
    lowbit.keep(world.base, lowbit.KINDS[kind], tmp_path / "kept", tmp_path / "widened")
    assert torch.equal(run(tmp_path / "kept", world).logits, run(tmp_path / "widened", world).logits)


@pytest.fixture(scope="module")
def disguised(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_saved(tmp_path_factory.mktemp("disguised"))


@pytest.mark.parametrize("rank", [None, 3])
def test_a_second_reading_finds_the_same(disguised: World, rank: int | None) -> None:
    """Proofs read the files apart from the builder, and find the products of its rows, cut ones too."""
    world = disguised
    store = world.built(truncate_to_rank=rank)
    generation = current_generation(store, "tiny")
    for name, folder in world.adapters.items():
        factors = read_adapter(folder, read_config(world.base), rank, world.base).layers
        rows = read_bundle(store, generation.adapters[name].digest).rows
        assert sorted((row.row.layer, row.row.module) for row in rows) == sorted(factors)
        for row in rows:
            product = torch.from_numpy(np.asarray(row.b) @ np.asarray(row.a))
            read = factors[row.row.layer, row.row.module].added(torch.eye(row.row.in_features)).T
            torch.testing.assert_close(read, product, rtol=0, atol=2e-5 * float(product.abs().max()))


def test_proofs_of_blocks_and_of_rows_hold(disguised: World) -> None:
    """MiSS and trainable tokens are read a second time, and replayed."""
    folders = {name: disguised.adapters[name] for name in ("miss", "miss-mini", "tokens", "tokens-of-both")}
    world = World(disguised.base, folders, disguised.root)
    expect_passed(world, proved(world))


def test_a_proof_knows_the_head_that_answers(tmp_path: Path) -> None:
    """The reference takes the same head: proofs of adapters on such a base hold."""
    world = make_world(tmp_path, tie_word_embeddings=True)
    rewrite(world.base, other_head)
    expect_passed(world, proved(world))


def test_rounded_weights_hold_proofs_too(tmp_path: Path) -> None:
    """Bases that are rounded to 8 and 4 bits at load, in float32 and in bfloat16."""
    world = make_world(tmp_path, hidden_size=64, intermediate_size=96, num_attention_heads=4)
    store = proved(world)
    for quantization in ("int8", "int4"):
        for dtype in ("float32", "bfloat16"):
            expect_passed(world, store, quantization=quantization, dtype=dtype)


def expect_passed(world: World, store: MemoryStore, **settings: Any) -> None:
    """Load a replica, in which every adapter passes its proof."""
    with capture_logs() as logs:
        world.load(store, **settings)
    found = {line["adapter"] for line in logs if line["event"] == "adapter passed its proof"}
    generation = current_generation(store, "tiny")
    assert found == {record.digest[:12] for record in generation.adapters.values()}


@pytest.mark.parametrize(
    ("vocab", "score", "file", "why"),
    [
        (7, None, "adapter_model.safetensors", "vocabulary"),
        (None, 1, "adapter_model.safetensors", "classifies texts"),
        (None, None, "adapter.gguf", "is a file of GGUF"),
    ],
)
def test_of_some_adapters_there_are_no_proofs(
    vocab: int | None, score: int | None, file: str, why: str
) -> None:
    """A build that must prove one is refused by name."""
    adapter: Any = SimpleNamespace(
        fetched=SimpleNamespace(name="one", files=[file]), checked=SimpleNamespace(vocab=vocab, score=score)
    )
    rest: Any = [None] * 6
    with pytest.raises(AdapterInvalid, match=f"'one' .*{why}.* cannot be proved"):
        prove_adapters([adapter], *rest)
