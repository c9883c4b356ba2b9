"""Checkpoints of few bits are served as transformers serves the weights that they mean."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from transformers import GlmConfig, LlamaConfig, Qwen3MoeConfig

from builder_service.pipeline import widener
from builder_service.pipeline.build import build
from builder_service.pipeline.check import check_one
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress
from inference_service.engine.layers.on_gpu import PackedLinear
from loramux_shared.bases.memory import count_weights
from loramux_shared.bases.read import read_config
from loramux_shared.faults import AdapterInvalid
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.support import lowbit_files as lowbit, tiny
from tests.support.lowbit_files import KINDS, WHOLE_BLOCKS, Kind, keep
from tests.support.thread_ranks import run_in_ranks

NEW = 10
PROMPT = list(range(3, 40))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tiny.World:
    return tiny.make_world(tmp_path_factory.mktemp("plain"))


@dataclass(frozen=True)
class Saved:
    """A world whose base is of few bits, and a checkpoint of the weights that it means."""

    world: tiny.World
    widened: Path


@pytest.fixture(scope="module", params=KINDS)
def retained(
    request: pytest.FixtureRequest, plain: tiny.World, tmp_path_factory: pytest.TempPathFactory
) -> Saved:
    folder = tmp_path_factory.mktemp(request.param)
    keep(plain.base, KINDS[request.param], folder / "kept", folder / "widened")
    return Saved(replace(plain, base=folder / "kept", root=folder.parent), folder / "widened")


def test_base_and_adapters_answer_as_transformers_with_the_widened_weights(retained: Saved) -> None:
    """Base and adapters answer as transformers in float32, token for token, all in one batch."""
    ready = retained.world.load(retained.world.built())
    models = ["base", "all"]
    expected = [
        tiny.oracle_tokens(tiny.oracle(retained.widened, retained.world.adapters.get(name)), PROMPT, NEW)
        for name in models
    ]
    assert tiny.run_engine(ready, [(name, PROMPT) for name in models], NEW) == expected


FOUR_BITS = {
    **{name: KINDS[name] for name in ("awq", "pack-quantized", "pack-symmetric")},
    "gptq": Kind(KINDS["gptq"].config | {"desc_act": False}, partial(lowbit.gptq, shuffled=False)),
}


@pytest.mark.parametrize("name", FOUR_BITS)
def test_weights_of_4_bits_stay_packed_for_the_kernels_of_gpus(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of 32 are multiplied as they are, others are widened: both mean the same tokens."""
    monkeypatch.setattr(lowbit, "GROUP", 32)
    width = 96 if name == "pack-symmetric" else 80  # not whole groups: down_proj is widened
    sizes = {"hidden_size": 64, "intermediate_size": width, "num_attention_heads": 4}
    if name == "awq":
        glm = GlmConfig(**tiny.SIZES | sizes, head_dim=16, pad_token_id=0)
        plain = tiny.make_world_of(tmp_path / "plain", glm, {})
    else:
        plain = tiny.make_world(tmp_path / "plain", **sizes)
    config = json.loads(json.dumps(FOUR_BITS[name].config).replace('"group_size": 16', '"group_size": 32'))
    keep(plain.base, replace(FOUR_BITS[name], config=config), tmp_path / "kept", tmp_path / "widened")
    store, found = MemoryStore(), []
    world = replace(plain, base=tmp_path / "kept", root=tmp_path, adapters={})
    world.build(store)
    for settings in ({"backend": "triton"}, {"backend": "torch", "device": "cpu"}):
        ready = world.load(store, **settings)
        linears = [type(each) for each in ready.base.model.linears()]
        assert (PackedLinear in linears) == (settings["backend"] == "triton")
        found.append(tiny.run_engine(ready, [("base", PROMPT[:9])], 3))
    assert found[0] == found[1]
    with run_in_ranks(ready, world.base, store, backend="triton") as ranks:
        assert PackedLinear in [type(each) for each in ranks.base.model.linears()]
        assert tiny.run_engine(ranks, [("base", PROMPT[:9])], 3) == found[0]


@pytest.mark.parametrize(
    "retained",
    ["nf4", *(pytest.param(kind, marks=pytest.mark.sweep) for kind in KINDS if kind != "nf4")],
    indirect=True,
)
def test_dora_is_over_the_norms_of_the_widened_weights(retained: Saved, tmp_path: Path) -> None:
    """A process beside the builder widens the weights: answers are PEFT's with those."""
    folder = tmp_path / "dora"
    tiny.make_adapter(
        retained.widened, folder, 3, r=4, lora_alpha=9, use_dora=True, target_modules=["q_proj", "down_proj"]
    )
    world, store = replace(retained.world, adapters={"dora": folder}), MemoryStore()
    sources = open_sources(local_roots=[retained.world.root, tmp_path])
    deployment = world.deployment()
    build(deployment, BuildContext(store, sources), Progress(["dora"]))
    expected = tiny.oracle_tokens(tiny.oracle(retained.widened, folder), PROMPT, NEW)
    assert tiny.run_engine(world.load(store), [("dora", PROMPT)], NEW) == [expected]


@pytest.mark.parametrize("retained", ["nf4"], indirect=True)
def test_without_torch_dora_of_few_bits_is_refused(
    retained: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A builder without the package refuses low-bit weights, and names the package."""
    monkeypatch.setattr(widener, "NEEDS", ("no_such_torch",))
    tiny.make_adapter(retained.widened, tmp_path / "dora", 3, r=4, use_dora=True, target_modules=["q_proj"])
    deployment = replace(retained.world, adapters={"dora": tmp_path / "dora"}).deployment()
    sources = open_sources(local_roots=[retained.world.root, tmp_path])
    with pytest.raises(AdapterInvalid, match=r"E_DORA .*torch beside the builder.*loramux\[inference\]"):
        build(deployment, BuildContext(MemoryStore(), sources), Progress(["dora"]))


OTHERS = {
    "fp8": (LlamaConfig(**tiny.SIZES), WHOLE_BLOCKS),
    "fp8-experts": (
        Qwen3MoeConfig(
            **tiny.SIZES | {"hidden_size": 64},
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
        ),
        WHOLE_BLOCKS,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_transformers_reads_the_same_from_the_same_files(tmp_path: Path, name: str) -> None:
    """Formats that transformers widens by itself without a GPU are read alike, experts included."""
    config, kind = OTHERS[name]
    tiny.make_checkpoint(tmp_path / "base", config)
    keep(tmp_path / "base", kind, tmp_path / "kept", tmp_path / "widened")
    world = tiny.World(tmp_path / "kept", {}, tmp_path)
    expected = tiny.oracle_tokens(tiny.oracle(world.base, None), PROMPT, NEW)
    assert tiny.run_engine(world.load(world.built()), [("base", PROMPT)], NEW) == [expected]


def test_what_widening_takes_is_reported_beforehand(plain: tiny.World, tmp_path: Path) -> None:
    """A check and a start report the widening beforehand, with the bytes of files and memory."""
    keep(plain.base, KINDS["gptq"], tmp_path / "kept", tmp_path / "widened")
    store = MemoryStore()
    world = replace(
        plain, base=tmp_path / "kept", root=tmp_path.parent, adapters={"all": plain.adapters["all"]}
    )
    world.build(store)
    files = (world.base / "model.safetensors").stat().st_size / 1e6
    memory = 4 * count_weights(read_config(world.base)) / 1e6
    reported = (
        f"widened from gptq (int4) at load: {files:.1f} MB in the files, {memory:.1f} MB in memory as float32"
    )
    with capture_logs() as logs:
        world.load(store)
    assert [log["weights"] for log in logs if log["event"] == "base has quantized weights"] == [reported]
    context = BuildContext(MemoryStore(), open_sources(local_roots=[world.root]), tmp_path / "work")
    report = check_one(world.deployment(), context, Progress(["all"]))
    assert [finding.found for finding in report.findings if finding.code == "W_WIDENED"] == [reported]
