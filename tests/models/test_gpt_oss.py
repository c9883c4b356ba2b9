"""gpt-oss in its published format: experts of four bits, as transformers reads the same files."""

from pathlib import Path
from typing import Any

import pytest
from transformers import GptOssConfig

from loramux_shared.faults import AdapterInvalid
from loramux_shared.storage.memory import MemoryStore
from tests.support.lowbit_files import EXPERTS, keep
from tests.support.tiny import SIZES, World, make_adapter, make_checkpoint, oracle, oracle_tokens, run_engine

PROMPT = list(range(3, 40))
NEW = 16
CONFIG = GptOssConfig(
    **SIZES | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
    head_dim=16,
    num_local_experts=4,
    num_experts_per_tok=2,
    pad_token_id=0,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the format that training saves."""
    folder = tmp_path_factory.mktemp("gpt-oss") / "plain"
    make_checkpoint(folder, CONFIG)
    return folder


def test_experts_of_four_bits_answer_as_transformers_widens_them(plain: Path) -> None:
    """The base and an adapter as OpenAI's cookbook trains it, of all linears and of some layers' experts."""
    base, adapter = plain.parent / "kept", plain.parent / "adapter"
    keep(plain, EXPERTS, base, plain.parent / "widened")
    experts = [f"1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    make_adapter(plain, adapter, 0, r=3, lora_alpha=6, target_modules="all-linear", target_parameters=experts)
    world = World(base, {"one": adapter}, plain.parent)
    expected = [oracle_tokens(oracle(base, folder), PROMPT, NEW) for folder in (None, adapter)]
    found = run_engine(world.load(world.built()), [("base", PROMPT), ("one", PROMPT)], NEW)
    assert found == expected
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"target_modules": [], "target_parameters": ["mlp.router.weight"]}, "E_TARGET_PARAMS"),
        ({"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj_bias"]}, "E_TARGET_PARAMS"),
    ],
    ids=["router", "biases"],
)
def test_what_else_could_be_trained_is_refused_by_name(
    plain: Path, tmp_path: Path, settings: dict[str, Any], code: str
) -> None:
    """Other trained parameters are refused by name, as PEFT saves them."""
    make_adapter(plain, tmp_path / "bad", 0, r=2, lora_alpha=2, **settings)
    with pytest.raises(AdapterInvalid) as refused:
        World(plain, {"bad": tmp_path / "bad"}, tmp_path.parent.parent).build(MemoryStore())
    assert code in {finding.code for finding in refused.value.findings}
