"""Kinds of adapters that amount to LoRA, saved by PEFT, against transformers and PEFT token for token."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from peft.utils import constants
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig

from builder_service.domain import kinds
from builder_service.domain.derived import NotMade
from builder_service.domain.initial import first_columns, leading
from builder_service.domain.peft_kinds.kind import PeftKind
from builder_service.pipeline.fix import FixedAdapter, fix_one
from builder_service.pipeline.progress import Progress
from loramux_shared.bases.families import load_families
from loramux_shared.faults import AdapterInvalid
from loramux_shared.storage.memory import MemoryStore
from tests.models.test_families import CASES
from tests.models.test_kinds import SOME, save
from tests.support.folders import context_of, deployment_of
from tests.support.tiny import SIZES, World, make_checkpoint, oracle, oracle_tokens, run_engine

KINDS: dict[str, Any] = {
    "plain": peft.LoraConfig(r=4, lora_alpha=6, **SOME),
    "pissa": peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", alpha_pattern={"v_proj": 3}, **SOME),
    "olora": peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="olora", use_rslora=True, **SOME),
    "pissa-dora": peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", use_dora=True, **SOME),
    "adalora": peft.AdaLoraConfig(init_r=4, lora_alpha=6, total_step=9, **SOME),
    "adalora-of-no-alpha": peft.AdaLoraConfig(init_r=4, lora_alpha=-3, total_step=9, **SOME),
    "vera": peft.VeraConfig(r=5, **SOME),
    "loha": peft.LoHaConfig(r=3, alpha=5, rank_pattern={"v_proj": 2}, **SOME),
    "lokr": peft.LoKrConfig(r=2, alpha=5, decompose_factor=4, **SOME),
    "ia3": peft.IA3Config(feedforward_modules=["down_proj"], **SOME),
    "ia3-twice": peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["up_proj", "o_proj", "down_proj"],
        feedforward_modules="down_proj$",
    ),
    "lokr-of-products": peft.LoKrConfig(r=1, alpha=5, decompose_both=True, alpha_pattern={"v_proj": 2}, **SOME),
}
OTHERS: dict[str, Any] = {
    "miss": peft.MissConfig(r=5, **SOME),
    "miss-random": peft.MissConfig(r=6, init_weights=False, **SOME),
    "miss-mini": peft.MissConfig(r=6, mini_r=4, init_weights="mini", **SOME),
    "tokens": peft.TrainableTokensConfig(token_indices=[50, 9, 5], task_type="CAUSAL_LM"),
    "tokens-of-both": peft.TrainableTokensConfig(
        token_indices=[9, 2, 33], task_type="CAUSAL_LM", target_modules=["embed_tokens", "lm_head"]
    ),
}
"""More, of which a replica of this size has no place for all beside those."""
PROMPT = [5, 9, 2, 40, 17, 33]
NEW = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_saved(tmp_path_factory.mktemp("disguised"))


def make_saved(root: Path) -> World:
    """A base with biases and an adapter of each kind."""
    make_checkpoint(root / "base", LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True))
    folders = {
        name: save(root / "base", root / name, each, at)
        for at, (name, each) in enumerate((KINDS | OTHERS).items())
    }
    return World(root / "base", folders, root)


@pytest.mark.parametrize("names", [tuple(KINDS), tuple(OTHERS)], ids=["some", "others"])
def test_what_amounts_to_lora_answers_as_peft_does(world: World, names: tuple[str, ...]) -> None:
    """Adapters of these kinds and the base in one batch, as the files are that PEFT saved."""
    folders = {name: world.adapters[name] for name in names}
    expected = [oracle_tokens(oracle(world.base, path), PROMPT, NEW) for path in folders.values()]
    expected.append(oracle_tokens(oracle(world.base, None), PROMPT, NEW))
    assert len(set(map(tuple, expected))) == len(expected)
    some = World(world.base, folders, world.root)
    assert run_engine(some.load(some.built()), [(name, PROMPT) for name in (*names, "base")], NEW) == expected


def test_what_is_written_as_lora_answers_as_the_kind_does(world: World) -> None:
    """PEFT answers alike with a folder that a fix wrote; kinds without A and B are refused."""
    for name, folder in world.adapters.items():
        fixed, out = fix(world, name)
        if name in ("pissa-dora", "ia3", "ia3-twice", "tokens", "tokens-of-both"):
            assert [finding.code for finding in fixed.findings] == ["E_NO_FIX"]
            continue
        if name == "plain":
            assert not fixed.changes
            continue
        assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
        expected = oracle_tokens(oracle(world.base, folder), PROMPT, NEW)
        assert oracle_tokens(oracle(world.base, out), PROMPT, NEW) == expected, name


def fix(world: World, name: str) -> tuple[FixedAdapter, Path]:
    """Write an adapter as plain LoRA, into a folder that is returned."""
    build = deployment_of(world.root, name).build
    out = world.root / f"fixed-{name}"
    return fix_one(build, context_of(world.root), Progress(build.lora_adapters), out), out


def tokens(*targets: str) -> Any:
    """Return the config of rows of some tokens, of these modules or of PEFT's choice."""
    return peft.TrainableTokensConfig(
        token_indices=[50, 9, 5], task_type="CAUSAL_LM", target_modules=list(targets) or None
    )


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> World:
    """A base whose head is its embeddings, and rows of both, and of the head alone."""
    root = tmp_path_factory.mktemp("tied")
    make_checkpoint(root / "base", LlamaConfig(**(SIZES | {"tie_word_embeddings": True})))
    configs = {"both": tokens(), "head": tokens("lm_head")}
    folders = {
        name: save(root / "base", root / name, each, at) for at, (name, each) in enumerate(configs.items())
    }
    return World(root / "base", folders, root)


def test_rows_of_a_tied_base_are_those_of_peft(tied: World) -> None:
    """Rows of embeddings are the head's too, however often the file has them; those of a head are not."""
    expected = [oracle_tokens(oracle(tied.base, path), PROMPT, NEW) for path in tied.adapters.values()]
    expected.append(oracle_tokens(oracle(tied.base, None), PROMPT, NEW))
    assert len(set(map(tuple, expected))) == len(expected)
    names = (*tied.adapters, "base")
    assert run_engine(tied.load(tied.built()), [(name, PROMPT) for name in names], NEW) == expected


HEAD_ROWS = "base_model.model.lm_head.trainable_tokens_delta"


def of_rows(folder: Path, tensors: dict[str, Any], **fields: Any) -> None:
    """Write rows with changes of their config."""
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("of", "fields", "changed", "expected"),
    [
        ("world", {"target_modules": ["lm_head"]}, {}, "E_TARGETS"),
        ("world", {"target_modules": "model.embed_tokens"}, {HEAD_ROWS: np.ones((3, 48), "f4")}, "E_TARGETS"),
        ("world", {"token_indices": [50, 9]}, {}, "E_EMBED"),
        ("world", {"token_indices": [50, 9, 9]}, {}, "E_EMBED"),
        ("world", {"token_indices": {"a": [1]}}, {}, "E_BAD_CONFIG"),
        ("tied", {}, {HEAD_ROWS: np.ones((3, 48), "f4")}, "E_EMBED"),
        ("tied", {}, {HEAD_ROWS: np.ones((3, 48), "i4")}, "E_DTYPE"),
    ],
)
def test_rows_that_peft_would_drop_or_mix_up_are_refused(
    request: pytest.FixtureRequest, of: str, fields: dict[str, Any], changed: dict[str, Any], expected: str
) -> None:
    """Rows of modules that the config leaves out, of other tokens, and of tied modules that differ."""
    there: World = request.getfixturevalue(of)
    folder = save(there.base, there.root / f"changed-{expected}-{len(str(fields))}-{len(changed)}", tokens(), 4)
    of_rows(folder, load_file(folder / "adapter_model.safetensors") | changed, **fields)
    with pytest.raises(AdapterInvalid) as refusal:
        World(there.base, {"rows": folder}, there.root).build(MemoryStore())
    assert expected in [finding.code for finding in refusal.value.findings]


def test_miss_that_multiplies_the_base_or_has_other_blocks_is_refused(world: World) -> None:
    """`bat` is no sum of the base and a product; a block of another width is another base's."""
    bat = save(world.base, world.root / "bat", peft.MissConfig(r=4, init_weights="bat", **SOME), 1)
    narrow = save(world.base, world.root / "narrow", peft.MissConfig(r=6, **SOME), 1)
    halves = {
        name: value[:, ::2].copy() for name, value in load_file(narrow / "adapter_model.safetensors").items()
    }
    save_file(halves, narrow / "adapter_model.safetensors", metadata={"format": "pt"})
    for folder, code in ((bat, "E_NOT_LORA"), (narrow, "E_DIMS")):
        with pytest.raises(AdapterInvalid) as refusal:
            World(world.base, {"miss": folder}, world.root).build(MemoryStore())
        assert {finding.code for finding in refusal.value.findings} == {code}


def test_vera_of_an_expert_that_all_rows_share(tmp_path: Path) -> None:
    """VeRA of a shared expert is cut to the expert's width, beside other experts of the base."""
    make_checkpoint(tmp_path / "base", CASES["qwen3_5-moe"].config)
    vera = peft.VeraConfig(r=5, task_type="CAUSAL_LM", target_modules=r".*shared_expert\.(up|down)_proj")
    folder = save(tmp_path / "base", tmp_path / "vera", vera, 1)
    world = World(tmp_path / "base", {"vera": folder}, tmp_path)
    expected = oracle_tokens(oracle(world.base, folder), PROMPT, NEW)
    assert expected != oracle_tokens(oracle(world.base, None), PROMPT, NEW)
    assert run_engine(world.load(world.built()), [("vera", PROMPT)], NEW) == [expected]


@pytest.mark.parametrize(
    "kind", [kind for kind in kinds.KINDS if kind.targets], ids=lambda kind: kind.peft_type
)
def test_modules_that_a_config_does_not_name_are_those_of_peft(kind: PeftKind) -> None:
    """The default modules are those of the installed PEFT, for every served architecture."""
    table = getattr(constants, f"TRANSFORMERS_MODELS_TO_{kind.peft_type}_TARGET_MODULES_MAPPING")
    for architecture, _ in load_families().values():
        found, expected = kind.targets.get(architecture.model_type), table.get(architecture.model_type)
        assert found == (tuple(expected) if isinstance(expected, list) else expected), architecture


def test_what_adalora_left_is_what_an_alpha_of_zero_means(world: World) -> None:
    """A pruned AdaLoRA module has its remaining rank as alpha where the config's alpha is 0, as in PEFT."""
    folder = save(
        world.base, world.root / "pruned", peft.AdaLoraConfig(init_r=4, lora_alpha=0, total_step=9, **SOME), 3
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["rank_pattern"] = {}
    for name in [name for name in tensors if name.endswith("lora_E")]:
        retained = [True, "v_proj" in name, True, False]
        config["rank_pattern"][name.removeprefix("base_model.model.")] = retained
        for part, axis in (("lora_E", 0), ("lora_A", 0), ("lora_B", 1)):
            each = name.replace("lora_E", part)
            tensors[each] = np.compress(retained, tensors[each], axis).copy()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config["alpha_pattern"] = {"v_proj": 99}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    pruned = World(world.base, {"pruned": folder}, world.root)
    expected = oracle_tokens(oracle(world.base, folder), PROMPT, NEW)
    assert run_engine(pruned.load(pruned.built()), [("pruned", PROMPT)], NEW) == [expected]


def test_a_base_that_does_not_say_what_it_lost_is_refused(world: World) -> None:
    """A base is refused if it is an identity, where no singular value is the largest, or has equal columns."""
    with pytest.raises(NotMade, match="singular values 4 and 5"):
        leading(np.eye(40), 4)
    with pytest.raises(NotMade, match="first 3 columns"):
        first_columns(np.ones((8, 6)), 3)
    flat = world.root / "flat"
    make_checkpoint(flat, LlamaConfig(**SIZES))
    tensors = load_file(flat / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] = np.eye(48, dtype=np.float32)
    save_file(tensors, flat / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterInvalid) as refusal:
        World(flat, {"pissa": world.adapters["pissa"]}, world.root).build(MemoryStore())
    assert [(finding.code, finding.where) for finding in refusal.value.findings] == [
        ("E_INIT", "layer 1 q_proj")
    ]
