"""A base in GGUF answers as transformers answers with the weights that its blocks mean."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from builder_service.pipeline.build import build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress
from loramux_shared.bundle.deployments import require_deployment
from loramux_shared.faults import CheckpointInvalid, Fault
from loramux_shared.sources.checkpoint import GGUF
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.gguf_files import write_gguf
from tests.support import tiny

NEW = 10
PROMPT = list(range(3, 40))
SMALL: dict[str, Any] = tiny.SIZES | {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
}
TYPES = {
    "attn_q": "Q4_K",
    "attn_k": "Q5_K",
    "attn_v": "Q6_K",
    "attn_output": "Q5_0",
    "ffn_gate": "Q4_0",
    "ffn_up": "Q5_1",
    "ffn_down": "Q4_K",
    "token_embd": "Q8_0",
    "output": "Q6_K",
}
"""Parts of a fused linear are of several types, as llama.cpp mixes them."""


def of_types(stem: str) -> str:
    """Return the type of a tensor; a layer has whole queries, as a file may have some of."""
    return "F16" if stem == "blk.1.attn_q" else TYPES[stem.rpartition(".")[2]]


def make(root: Path, config: Any) -> tiny.World:
    """Make a world whose base is of GGUF; its checkpoint in safetensors means the same."""
    world = tiny.make_world_of(root, config, tiny.ADAPTERS)
    written = json.loads((world.base / "config.json").read_text())
    write_gguf(root / "tiny.gguf", world.base, written | {"rope_theta": 10000.0}, of_types)
    return replace(world, base=root / "tiny.gguf")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tiny.World:
    return make(tmp_path_factory.mktemp("llama"), LlamaConfig(**SMALL))


def answers(world: tiny.World, models: list[str], **settings: Any) -> list[list[int]]:
    return tiny.run_engine(world.load(world.built(), **settings), [(name, PROMPT) for name in models], NEW)


@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_base_and_adapters_answer_as_transformers_with_the_dequantised_weights(
    family: Any, tmp_path: Path
) -> None:
    """All in one batch, token for token in float32, in a linear of several types and one that is widened."""
    tied = family is Qwen3Config
    world = make(tmp_path, family(**SMALL | {"tie_word_embeddings": tied, "head_dim": 32}))
    models = ["base", *tiny.ADAPTERS]
    expected = [
        tiny.oracle_tokens(tiny.oracle(tmp_path / "base", world.adapters.get(name)), PROMPT, NEW)
        for name in models
    ]
    assert answers(world, models) == expected
    assert answers(world, ["base"], backend="torch") == expected[:1]


def test_blocks_stay_as_they_are_on_a_processor(llama: tiny.World) -> None:
    """The start says which types they are of, and the weights take what the file takes."""
    store = llama.built()
    [ready] = [llama.load(store, dtype="bfloat16")]
    generation = require_deployment(store, "tiny")
    assert set(generation.base.files) >= {GGUF, "config.json", "tokenizer.json", "chat_template.jinja"}
    assert generation.base.weights_bytes == llama.base.stat().st_size
    runner: Any = ready.engine._engine._runner
    linears = list(runner._model.linears())
    assert [linear.saved_bytes > 0 for linear in linears] == [True] * 4 + [False] + [True] * 3
    assert tiny.run_engine(ready, [("base", PROMPT)], NEW)


def test_an_adapter_alone_is_not_merged_into_blocks(llama: tiny.World) -> None:
    store = MemoryStore()
    replace(llama, adapters={"wide": llama.adapters["wide"]}).build_with(store)
    assert llama.load(store).bank is not None


def test_dora_is_over_the_norms_of_the_dequantised_weights(llama: tiny.World, tmp_path: Path) -> None:
    """A process beside the builder reads the weights: answers are PEFT's, of blocks and of whole queries."""
    base, folder = llama.root / "base", tmp_path / "dora"
    tiny.make_adapter(base, folder, 3, r=4, lora_alpha=9, use_dora=True, target_modules=["q_proj", "down_proj"])
    sources = open_sources(local_roots=[llama.root, tmp_path], work_dir=tmp_path)
    world, store = replace(llama, adapters={"dora": folder}), MemoryStore()
    build(world.deployment(), BuildContext(store, sources), Progress(["dora"]))
    expected = tiny.oracle_tokens(tiny.oracle(base, folder), PROMPT, NEW)
    assert tiny.run_engine(world.load(store), [("dora", PROMPT)], NEW) == [expected]


def test_the_file_in_a_folder_is_to_be_named_itself(llama: tiny.World) -> None:
    (llama.root / "some").mkdir()
    (llama.root / "some" / "a.gguf").write_bytes(b"GGUF")
    world = replace(llama, base=llama.root / "some", adapters={})
    with pytest.raises(CheckpointInvalid, match=r"named itself, of source LOCAL: FOLDER/a\.gguf"):
        world.build(MemoryStore())


def test_a_file_that_changed_is_no_longer_the_recorded_base(llama: tiny.World, tmp_path: Path) -> None:
    copied = tmp_path / "tiny.gguf"
    copied.write_bytes(llama.base.read_bytes())
    world = replace(llama, base=copied, root=tmp_path, adapters={})
    store = world.built()
    with copied.open("r+b") as file:
        file.seek(-64, 2)
        file.write(bytes(64))
    with pytest.raises(Fault, match=r"model\.gguf: expected sha256"):
        world.load(store)
    copied.write_bytes(b"GGUF")
    with pytest.raises(CheckpointInvalid, match="ends within its header"):
        world.load(store)
