"""Adapters of experts in all their forms, and mixtures where no whole decoder has them yet."""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3_5MoeTextConfig, Qwen3MoeConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock

from inference_service.backends.operations import Operations
from inference_service.kernels.attention import Context
from inference_service.models.blocks import Cache, Step
from inference_service.models.checkpoint import Checkpoint
from inference_service.models.experts import ExpertsBlock
from inference_service.models.reader import Reader
from inference_service.startup import bank
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.layers import ExpertsLayer, LayerSpec
from loramux_shared.bases.read import read_fields
from loramux_shared.faults import AdapterInvalid
from loramux_shared.storage.memory import MemoryStore
from tests.models.conftest import Counted
from tests.support.tiny import (
    SIZES,
    VOCAB,
    World,
    make_adapter,
    make_checkpoint,
    make_world_of,
    oracle,
    oracle_tokens,
    run_engine,
)

NUM, INNER, HIDDEN = 6, 20, SIZES["hidden_size"]
CONFIG = Qwen3MoeConfig(
    **SIZES, num_experts=NUM, num_experts_per_tok=2, moe_intermediate_size=INNER, norm_topk_prob=True
)
ROOT = "base_model.model.model.layers.{layer}.mlp.experts"
FEATURES = {"gate_proj": (HIDDEN, INNER), "up_proj": (HIDDEN, INNER), "down_proj": (INNER, HIDDEN)}
PARAMETERS: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 6,
    "target_modules": [],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
NEW = 12


def prompts() -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randrange(3, VOCAB) for _ in range(length)] for length in (31, 1, 18)]


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> None:
    """Save tensors with a config."""
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))


def of_each(rank_of: Callable[[int, str], int], seed: int = 0) -> dict[str, Tensor]:
    """A and B of modules of single experts, as adapters of transformers 4 have them."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for layer in range(2):
        for expert in range(NUM):
            for leaf, (inside, out) in FEATURES.items():
                if rank := rank_of(expert, leaf):
                    name = f"{ROOT.format(layer=layer)}.{expert}.{leaf}"
                    found[f"{name}.lora_A.weight"] = torch.randn(rank, inside, generator=generator) * 0.2
                    found[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.2
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an expert's tensors each by itself, as the hub has them."""
    folder = tmp_path_factory.mktemp("mixture")
    make_checkpoint(folder / "base", CONFIG)
    return folder / "base"


def answered(base: Path, adapters: Mapping[str, Path], **settings: Any) -> list[list[int]]:
    """Return the answers of adapters, all of them and the base in one batch."""
    world, store = World(base, adapters, base.parent), MemoryStore()
    world.build(store)
    requests = [(name, prompt) for name in ("base", *adapters) for prompt in prompts()]
    return run_engine(world.load(store, **settings), requests, NEW)


def expected_of(base: Path, adapters: Mapping[str, Path]) -> list[list[int]]:
    """The same by transformers and PEFT."""
    models = [oracle(base, None), *(oracle(base, folder) for folder in adapters.values())]
    return [oracle_tokens(model, prompt, NEW) for model in models for prompt in prompts()]


def test_modules_of_single_experts_are_what_peft_makes_of_them(base: Path) -> None:
    """Modules of single experts equal PEFT's in the form of transformers 4, which PEFT converts."""
    folder = base.parent / "each"
    save_adapter(folder, of_each(lambda *_: 2), r=2, lora_alpha=5, target_modules=[*FEATURES])
    assert answered(base, {"each": folder}) == expected_of(base, {"each": folder})


def test_experts_of_one_adapter_may_differ_in_rank_and_modules(base: Path) -> None:
    """Experts that PEFT cannot convert equal the same products, added to the weights of a copy of the base."""
    tensors = of_each(lambda expert, leaf: (expert + len(leaf)) % 4)
    folder, merged = base.parent / "mixed", base.parent / "merged"
    ranks = {name: len(a) for name, a in tensors.items() if "lora_A" in name}
    pattern = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight").replace(".", r"\."): rank
        for name, rank in ranks.items()
    }
    config = {"r": 1, "lora_alpha": 1, "use_rslora": True, "target_modules": [*FEATURES]}
    save_adapter(folder, tensors, **config, rank_pattern=pattern)
    make_checkpoint(merged, CONFIG)
    weights = load_file(merged / "model.safetensors")
    for name, rank in ranks.items():
        b = tensors[name.replace("lora_A", "lora_B")]
        target = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
        weights[target] += b @ tensors[name] / rank**0.5
    save_file(weights, merged / "model.safetensors")
    plain, changed = oracle(base, None), oracle(merged, None)
    expected = [oracle_tokens(model, prompt, NEW) for model in (plain, changed) for prompt in prompts()]
    assert answered(base, {"mixed": folder}) == expected


def test_parameters_that_were_taken_by_position_are_the_transposed(tmp_path: Path) -> None:
    """A and B of parameters that older releases saved have changed places, with the same products."""
    world = make_world_of(tmp_path, CONFIG, {"new": PARAMETERS})
    new, old = load_file(world.adapters["new"] / "adapter_model.safetensors"), {}
    for name in (name for name in new if "lora_A" in name):
        other = name.replace("lora_A", "lora_B")
        a, b = new[name].view(NUM, 2, -1), new[other].view(len(new[other]), 2, NUM)
        old[name] = b.permute(2, 1, 0).reshape(NUM * 2, -1)
        old[other] = a.permute(2, 1, 0).reshape(a.shape[2], -1)
    save_adapter(tmp_path / "old", old, **PARAMETERS)
    adapters = {"new": world.adapters["new"], "old": tmp_path / "old"}
    count = len(prompts())
    found = answered(world.base, adapters)
    assert found[2 * count :] == found[count : 2 * count]
    assert found[count : 2 * count] != found[:count]


@pytest.mark.parametrize(
    "settings", [{"backend": "torch"}, {"deterministic": True}], ids=["torch", "deterministic"]
)
def test_parameters_are_what_peft_makes_of_them(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Parameters of experts act as one linear each, with and without batch-invariant operations."""
    world = make_world_of(tmp_path, CONFIG, {"one": PARAMETERS})
    assert answered(world.base, world.adapters, **settings) == expected_of(world.base, world.adapters)


@pytest.mark.sweep
@pytest.mark.parametrize("settings", [{}, {"backend": "torch"}, {"kv_memory_gb": 0.0004}], ids=str)
def test_one_among_31_answers_as_alone_and_as_transformers(
    base: Path, settings: dict[str, Any], counted: Counted
) -> None:
    """64 tokens of both forms of adapters and of the base, past chunks and blocks, preempted or not."""
    folders = {"each": base.parent / "each of 31", "all": base.parent / "all of 31"}
    if not folders["each"].exists():
        save_adapter(folders["each"], of_each(lambda *_: 2), r=2, lora_alpha=5, target_modules=[*FEATURES])
        make_adapter(base, folders["all"], 9, **PARAMETERS | {"target_modules": ["q_proj", "o_proj"]})
    world, store, draw = World(base, folders, base.parent), MemoryStore(), random.Random(1)
    world.build(store)
    names = ["base", *folders]
    requests = [
        (names[index % 3], [draw.randrange(3, VOCAB) for _ in range(draw.choice((1, 15, 16, 17, 60, 90)))])
        for index in range(32)
    ]
    models = {name: oracle(base, folders.get(name)) for name in names}
    expected = [oracle_tokens(models[name], prompt, 64) for name, prompt in requests]
    ready = world.load(store, max_batch_tokens=64, max_batch_seqs=32, **settings)
    backend = settings.get("backend", "native")
    situation = "preempted" if "kv_memory_gb" in settings else "among 31"
    counted("Qwen3MoeForCausalLM", backend, situation, run_engine(ready, requests, 64), expected)
    counted("Qwen3MoeForCausalLM", backend, "alone", run_engine(ready, requests[:3], 64), expected[:3])
    assert (ready.engine.stats.preemptions > 0) is ("kv_memory_gb" in settings)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_slots_are_as_many_as_their_tables_have_memory_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """A slot has fields for every module of every expert, though few adapters have any."""
    world, store = make_world_of(tmp_path, CONFIG, {"one": PARAMETERS}), MemoryStore()
    world.build(store)
    monkeypatch.setattr(bank, "MAX_TABLES", 1 << 20)
    ready = world.load(store, backend=backend)
    lora = ready.bank.lora
    assert lora.num_slots == (1 << 20) // lora.slot_bytes < bank.MAX_SLOTS
    assert lora.num_bytes >= lora.num_slots * lora.slot_bytes


REFUSED: dict[str, tuple[str, dict[str, Any], Callable[[dict[str, Tensor]], None]]] = {
    "no such expert": ("E_MODULE", {}, lambda t: _rename(t, ".3.", ".6.")),
    "an expert by another name": ("E_MOE", {}, lambda t: _rename(t, ".3.", ".03.")),
    "a module that experts do not have": ("E_MOE", {}, lambda t: _rename(t, "3.down_proj", "3.w2")),
    "of another size": ("E_DIMS", {}, lambda t: _narrow(t, "3.down_proj.lora_A.weight")),
}


def _rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for name in [name for name in tensors if old in name]:
        tensors[name.replace(old, new)] = tensors.pop(name)


def _narrow(tensors: dict[str, Tensor], end: str) -> None:
    for name in [name for name in tensors if name.endswith(end)]:
        tensors[name] = tensors[name][:, 1:]


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_an_experts_is_refused_by_name(base: Path, what: str) -> None:
    """An adapter of unsupported modules is refused by name."""
    code, config, change = REFUSED[what]
    tensors = of_each(lambda *_: 2)
    change(tensors)
    fields = {"r": 2, "lora_alpha": 5, "target_modules": [*FEATURES, "w2", "x"]} | config
    folder = base.parent / what.replace(" ", "-")
    save_adapter(folder, tensors, **fields)
    with pytest.raises(AdapterInvalid) as refused:
        answered(base, {"bad": folder})
    assert code in {finding.code for finding in refused.value.findings}


def test_an_expert_that_all_rows_have_is_added_as_its_gate_says(tmp_path: Path) -> None:
    """An expert that all rows have is added by its gate, as in Qwen 3.5, with the experts of a layer in one
    tensor.
    """
    torch.manual_seed(0)
    config = Qwen3_5MoeTextConfig(
        hidden_size=HIDDEN,
        num_experts=NUM,
        num_experts_per_tok=2,
        moe_intermediate_size=INNER,
        shared_expert_intermediate_size=28,
    )
    block: Any = Qwen3_5MoeSparseMoeBlock(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    plain = read_fields(CONFIG.to_dict() | {"architectures": ["Qwen3MoeForCausalLM"]})
    spec = ExpertsLayer(NUM, 2, INNER, renormalised=True, shared=28)
    model = _with_mlp(plain, spec)
    tensors = {f"model.layers.0.mlp.{name}": value for name, value in block.state_dict().items()}
    ops = Operations(torch.float32, torch.device("cpu"))
    save_file(tensors | {"model.norm.weight": torch.ones(HIDDEN)}, tmp_path / "model.safetensors")
    reader = Reader(Checkpoint(tmp_path, torch.float32, torch.device("cpu")), model, torch.float32, ops)
    x = torch.randn(9, HIDDEN)
    context = Context(row=0, length=len(x), blocks=[0], end=len(x))
    step = Step(ops, ops.attention([context], 16, [None]), Cache(()), None, (), None)
    found = ExpertsBlock(reader.layer(0), spec)(step, x)
    torch.testing.assert_close(found, block(x[None])[0], atol=2e-5, rtol=1e-5)


def _with_mlp(model: ModelConfig, spec: ExpertsLayer) -> ModelConfig:
    return replace(model, layers=tuple(LayerSpec(layer.mixer, spec) for layer in model.layers))
