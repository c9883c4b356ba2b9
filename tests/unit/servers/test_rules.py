"""Rules about other servers: what their data may say, and what untrusted configs may not do to them."""

from pathlib import Path
from typing import Any

import pytest

from loramux.servers.conditions import CONDITIONS
from loramux.servers.facts import Facts, Unreadable, header_shapes, read_facts, read_header
from loramux.servers.verdicts import Outcome, judge, rules_of, servers
from tests.support.adapters import tensors, write_adapter

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
PAIR = {KEY.format("A"): (4, 16), KEY.format("B"): (16, 4)}
FILES = frozenset({"adapter_config.json", "adapter_model.safetensors"})
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def facts(config: dict[str, Any], shapes: dict[str, tuple[int, ...]] | None = None, **base: Any) -> Facts:
    return Facts(FILES, PLAIN | config, PAIR if shapes is None else shapes, 64, base)


@pytest.mark.parametrize("server", servers())
def test_rows_name_known_conditions_and_their_source(server: str) -> None:
    """Each row has a cause, a cure and a source, and says whether it was run or read."""
    for rule in rules_of(server):
        assert all(name in CONDITIONS for name, *_ in rule.conditions)
        assert rule.why
        assert rule.fix
        assert rule.source
        assert rule.how in {"run", "read"}
        assert rule.outcome is not Outcome.EXACT


@pytest.mark.parametrize(
    ("config", "server", "expected"),
    [
        ({}, "vllm", Outcome.EXACT),
        ({"use_rslora": True}, "sglang", Outcome.OTHER),
        ({"alpha_pattern": {"q_proj": 8}}, "llama.cpp", Outcome.EXACT),
        ({"alpha_pattern": {"q_proj": 9}}, "llama.cpp", Outcome.OTHER),
        ({"target_modules": ".*q_proj"}, "sglang", Outcome.REFUSED),
        ({"target_modules": "all-linear"}, "tensorrt-llm", Outcome.EXACT),
        ({"r": 128, "rank_pattern": {"q_proj": 4}}, "vllm", Outcome.REFUSED),
        ({"r": 8}, "vllm", Outcome.OTHER),
        ({"r": 8, "rank_pattern": {r".*\.q_proj": 4}}, "vllm", Outcome.EXACT),
    ],
)
def test_fields_decide(config: dict[str, Any], server: str, expected: Outcome) -> None:
    """A field that changes nothing is not held against an adapter."""
    both = {**PAIR, **{key.replace("q_proj", "v_proj"): shape for key, shape in PAIR.items()}}
    shapes = both if server == "sglang" else PAIR
    assert judge(server, facts(config, shapes)).outcome is expected


def test_the_worst_rule_counts_and_names_all_its_tensors() -> None:
    """An adapter with layers beyond the base and wrapped keys is one that ignores both."""
    shapes = PAIR | {
        KEY.format("A").replace(".0.", ".7."): (4, 16),
        KEY.format("B").replace(".0.", ".7."): (16, 4),
    }
    shapes |= {f"_orig_mod.{key}": shape for key, shape in PAIR.items()}
    verdict = judge("vllm", facts({}, shapes, num_hidden_layers=2))
    assert verdict.text == "loads it and ignores 4 of 6 tensors"
    assert judge("vllm", facts({"use_dora": True}, shapes, num_hidden_layers=2)).outcome is Outcome.REFUSED


@pytest.mark.parametrize("pattern", ["(a+)+$", "a**", "q_proj\\", "[", "a" * 1000, "(?P<x"])
def test_patterns_of_a_config_are_not_trusted(pattern: str) -> None:
    """A pattern that is none, or that could take long, counts for a module of its name."""
    assert judge("peft", facts({"rank_pattern": {pattern: 8}})).outcome is Outcome.EXACT


@pytest.mark.parametrize("value", [None, True, -1, 3.5, "x", [], [[1]], {}, {"q_proj": "x"}, {"a": [True]}])
def test_any_value_of_any_field_has_a_verdict(value: Any) -> None:
    """A field with a value that no program writes is judged, and raises nothing."""
    for name in (*PLAIN, "rank_pattern", "alpha_pattern", "modules_to_save", "feedforward_modules", "bias"):
        for server in servers():
            judge(server, facts({name: value}, text_config=value, num_hidden_layers=value))


@pytest.mark.parametrize(
    "header",
    [b"", b"\xff" * 9, b"\x02\0\0\0\0\0\0\0{", b"\x02\0\0\0\0\0\0\0[]", b'\x09\0\0\0\0\0\0\0{"a": {}}'],
)
def test_a_broken_header_is_an_unreadable_file(tmp_path: Path, header: bytes) -> None:
    """A file without a header is refused, as servers refuse it."""
    file = write_adapter(tmp_path / "one") / "adapter_model.safetensors"
    file.write_bytes(header)
    found = read_facts(tmp_path / "one", 64)
    assert found.tensors is None
    assert judge("vllm", found).outcome is Outcome.REFUSED
    with file.open("rb") as opened, pytest.raises(Unreadable):
        header_shapes(read_header(opened), 0)


def test_a_file_that_was_cut_off_is_unreadable(tmp_path: Path) -> None:
    """The header says how long the data are; none of them is read."""
    folder = write_adapter(tmp_path / "one")
    file = folder / "adapter_model.safetensors"
    assert read_facts(folder, 64).keys == set(tensors())
    file.write_bytes(file.read_bytes()[:-1])
    assert read_facts(folder, 64).tensors is None
