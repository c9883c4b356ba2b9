"""Adapters of experts in all their forms, and mixtures where no whole decoder has them yet."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3MoeConfig

from inference_service.startup import bank
from loramux_shared.faults import AdapterInvalid
from tests.support import tiny

NUM, INNER, HIDDEN = 6, 20, tiny.SIZES["hidden_size"]
CONFIG = Qwen3MoeConfig(
    **tiny.SIZES, num_experts=NUM, num_experts_per_tok=2, moe_intermediate_size=INNER, norm_topk_prob=True
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
    return [[draw.randrange(3, tiny.VOCAB) for _ in range(length)] for length in (31, 1, 18)]


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> None:
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
    tiny.make_checkpoint(folder / "base", CONFIG)
    return folder / "base"


def answered(base: Path, adapters: Mapping[str, Path], **settings: Any) -> list[list[int]]:
    """Return the answers of adapters, all of them and the base in one batch."""
    world = tiny.World(base, adapters, base.parent)
    requests = [(name, prompt) for name in ("base", *adapters) for prompt in prompts()]
    return tiny.run_engine(world.load(world.built(), **settings), requests, NEW)


def expected_of(base: Path, adapters: Mapping[str, Path]) -> list[list[int]]:
    """The same by transformers and PEFT."""
    models = [tiny.oracle(base, None), *(tiny.oracle(base, folder) for folder in adapters.values())]
    return [tiny.oracle_tokens(model, prompt, NEW) for model in models for prompt in prompts()]


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
    tiny.make_checkpoint(merged, CONFIG)
    weights = load_file(merged / "model.safetensors")
    for name, rank in ranks.items():
        b = tensors[name.replace("lora_A", "lora_B")]
        target = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
        weights[target] += b @ tensors[name] / rank**0.5
    save_file(weights, merged / "model.safetensors")
    plain, changed = tiny.oracle(base, None), tiny.oracle(merged, None)
    expected = [tiny.oracle_tokens(model, prompt, NEW) for model in (plain, changed) for prompt in prompts()]
    assert answered(base, {"mixed": folder}) == expected


def test_parameters_that_were_taken_by_position_are_the_transposed(tmp_path: Path) -> None:
    """A and B of parameters that older releases saved have changed places, with the same products."""
    world = tiny.make_world_of(tmp_path, CONFIG, {"new": PARAMETERS})
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
    world = tiny.make_world_of(tmp_path, CONFIG, {"one": PARAMETERS})
    assert answered(world.base, world.adapters, **settings) == expected_of(world.base, world.adapters)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_slots_are_as_many_as_their_tables_have_memory_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """A slot has fields for every module of every expert, though few adapters have any."""
    world = tiny.make_world_of(tmp_path, CONFIG, {"one": PARAMETERS})
    monkeypatch.setattr(bank, "MAX_TABLES", 1 << 20)
    ready = world.load(world.built(), backend=backend)
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
