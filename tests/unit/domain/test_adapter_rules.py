"""Rules of the builder: configs, tensors and texts that an adapter brings, and shapes where layers differ."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from builder_service.domain.rules import texts
from builder_service.domain.rules.adapter import check_adapter
from builder_service.domain.rules.checked import CheckedAdapter, Rulebook
from builder_service.domain.rules.files import file_findings
from builder_service.domain.rules.tensors import AdapterLimits
from loramux_shared.bases.read import read_fields
from loramux_shared.deployment import Dtype
from tests.support.adapters import BASE_CONFIG, HIDDEN, key, tensors, write_adapter
from tests.support.cases import cases

ROOT = "base_model.model.model."
DOCS = Path(__file__).parents[3] / "docs"


def book(dtype: Dtype = Dtype.BFLOAT16, max_rank: int = 64, modules=(), **config: Any) -> Rulebook:
    limits = AdapterLimits(read_fields(BASE_CONFIG | config), max_rank, frozenset(modules))
    return Rulebook(limits, ("LlamaForCausalLM",), dtype)


def codes(checked: CheckedAdapter) -> list[str]:
    return [finding.code for finding in checked.findings]


@pytest.mark.parametrize(
    "field",
    cases(__file__, "test_what_acts_before_the_invocation_is_refused_beside_it"),
    ids=lambda field: next(iter(field)),
)
def test_what_acts_before_the_invocation_is_refused_beside_it(tmp_path, field):
    """A part that PEFT puts into the model acts on every token, and the others have no activated form."""
    (name,) = field
    checked = check_adapter(write_adapter(tmp_path, alora_invocation_tokens=[1, 2], **field), book())
    assert f"adapter_config.json: {name}" in [f.where for f in checked.errors if f.code == "E_ALORA"]


def test_a_config_that_is_refused_does_not_hide_what_tensors_without_a_rank_are(tmp_path):
    """Whole factors of LoKr show no rank, and neither does a config that cannot be read: both are judged."""
    name = key(0, "q_proj", "A").removesuffix("lora_A.weight")
    factors = {f"{name}lokr_w{number}": np.ones((4, 4), np.float32) for number in (1, 2)}
    config = {"peft_type": "LOKR", "alpha": 8, "lora_alpha": None, "r": -1}
    assert codes(check_adapter(write_adapter(tmp_path, factors, **config), book())) == ["E_BAD_CONFIG"]


def test_subfolder_is_suggested():
    """An adapter one folder below is not taken silently, but named."""
    (finding,) = file_findings(["checkpoint-500/adapter_config.json", "README.md"])
    assert finding.fix == "The adapter is in 'checkpoint-500': set subfolder, or name that folder."
    (finding,) = file_findings(["adapter_config.json"])
    assert (finding.code, finding.where) == ("E_NO_WEIGHTS", "adapter_model.safetensors")


@pytest.mark.parametrize(("page", "files", "code"), cases(__file__, "test_a_page_names_the_code_of_a_folder"))
def test_a_page_names_the_code_of_a_folder(page, files, code):
    """Pages name the codes by which files that trainers write beside adapters, or instead, are refused."""
    (finding,) = file_findings(files)
    assert finding.code == code
    assert f"`{code}`" in (DOCS / "move" / page).read_text()


@pytest.mark.parametrize(
    ("config", "extra", "words"), cases(__file__, "test_messages_name_field_value_expected_and_cure")
)
def test_messages_name_field_value_expected_and_cure(tmp_path, config, extra, words):
    """A finding has its code, its field, what is expected, what was found and the cure."""
    values = tensors() | {name: np.ones(shape, np.float16) for name, shape in extra.items()}
    (finding,) = check_adapter(write_adapter(tmp_path, values, **config), book()).errors
    stated = (finding.code, finding.where, finding.expected, finding.found, finding.fix)
    for word, text in zip(words, stated, strict=True):
        assert word in text


def test_thousands_of_causes_are_few_findings(tmp_path):
    """A file in which everything is wrong in its own way fills no report: the others are counted."""
    values = {f"{ROOT}layers.0.x{i}.lora_A.weight": np.ones((1, 1), np.float16) for i in range(1000)}
    found = check_adapter(write_adapter(tmp_path, values), book()).findings
    assert codes(CheckedAdapter(found)) == ["E_MODULE"] * 33
    assert found[-1].found == "968 more of this code, each for another cause"


def found(name: str, content: Any) -> list[tuple[str, str]]:
    """Return codes and places of the findings in a file."""
    data = content.encode("latin-1") if isinstance(content, str) else json.dumps(content).encode()
    return [(finding.code, finding.where) for finding in texts.check_texts({name: data}, vocab=100)]


@pytest.mark.parametrize(("name", "content"), cases(__file__, "test_what_trainers_write_is_accepted"))
def test_what_trainers_write_is_accepted(name: str, content: Any) -> None:
    """The files that trainers write beside the weights have no findings."""
    assert found(name, content) == []


@pytest.mark.parametrize(
    ("name", "content", "field"), cases(__file__, "test_what_cannot_be_used_refuses_the_adapter")
)
def test_what_cannot_be_used_refuses_the_adapter(name: str, content: Any, field: str) -> None:
    """A broken file is refused with its name and field: serving with the base's instead would be a guess."""
    assert found(name, content) == [("E_BAD_TEXT", f"{name}: {field}" if field else name)]


def test_size_is_looked_at_before_anything_is_fetched() -> None:
    """A text above its bound is found by its size alone."""
    sizes = dict.fromkeys((texts.TEMPLATE, texts.GENERATION, texts.TOKENIZER, "other.bin"), 1 << 30) | {
        texts.GENERATION: 10
    }
    assert [finding.where for finding in texts.too_large(sizes)] == [texts.TEMPLATE, texts.TOKENIZER]
    assert texts.too_large(dict(texts.MAX_BYTES)) == []


def test_what_a_file_says_is_not_repeated_at_length() -> None:
    """Thousands of bad fields, and fields with names of a kilobyte, make few findings and short ones."""
    tokens = {texts.TOKENIZER: json.dumps({f"{i}_{'x' * 1000}_token": i for i in range(1000)}).encode()}
    unused = {texts.GENERATION: json.dumps({f"{i}_{'x' * 1000}": i for i in range(30)}).encode()}
    findings = [*texts.check_texts(tokens, vocab=100), *texts.check_texts(unused, vocab=100)]
    assert len(findings) == 33
    assert max(len(str(finding)) for finding in findings) < 1200


BASE: dict[str, Any] = BASE_CONFIG | {
    "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "attention_k_eq_v": True,
    "global_head_dim": 8, "head_dim": 4, "hidden_size_per_layer_input": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "num_global_key_value_heads": 1,
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
}  # fmt: skip
"""Four heads: of 4 dimensions in layers 0 and 2, of 8 in layers 1 and 3; the last two read the others' keys."""
GOOD = cases(__file__, "GOOD")
OF_LAYER_1 = "q_proj, k_proj, o_proj, gate_proj, up_proj, down_proj, per_layer_input_gate, per_layer_projection"


def _findings(folder: Path, modules: dict[str, tuple[int, int]]) -> list[tuple[str, str, str]]:
    """Return the refusals of an adapter of these modules: code, expected and found value."""
    made: dict[str, Any] = {}
    for name, (inside, out) in modules.items():
        for side, shape in {"A": (4, inside), "B": (out, 4)}.items():
            made[f"base_model.model.model.{name}.lora_{side}.weight"] = np.ones(shape, ml_dtypes.bfloat16)
    targets = sorted({name.rpartition(".")[2] for name in modules})
    rules = Rulebook(AdapterLimits(read_fields(BASE), 64, frozenset()), ("Gemma4ForCausalLM",), Dtype.BFLOAT16)
    checked = check_adapter(write_adapter(folder, made, target_modules=targets), rules)
    return [(finding.code, finding.expected, finding.found) for finding in checked.errors]


def test_modules_have_the_shapes_of_their_layers(tmp_path: Path) -> None:
    """Wider heads, wider MLPs, layers without keys or values, inputs of layers."""
    assert _findings(tmp_path, GOOD) == []


@pytest.mark.parametrize(
    ("module", "shape", "code", "expected", "found"),
    [
        ("layers.1.self_attn.v_proj", (HIDDEN, 8), "E_MODULE", OF_LAYER_1, "v_proj"),
        ("layers.2.self_attn.k_proj", (HIDDEN, 8), "E_MODULE", OF_LAYER_1.replace("k_proj, ", ""), "k_proj"),
        ("layers.1.self_attn.q_proj", (HIDDEN, 16), "E_DIMS", "in=16 out=32", "in=16 out=16"),
        ("layers.0.mlp.up_proj", (HIDDEN, 48), "E_DIMS", "in=16 out=24", "in=16 out=48"),
        ("per_layer_model_projection", (HIDDEN, 24), "E_MODULE", "lora_A", "per_layer_model_projection"),
    ],
)
def test_what_a_layer_does_not_have_is_refused_by_name(
    tmp_path: Path, module: str, shape: tuple[int, int], code: str, expected: str, found: str
) -> None:
    """The refusal has the modules of the layer, or their shapes."""
    [refusal] = dict.fromkeys(_findings(tmp_path, {module: shape}))
    assert (refusal[0], refusal[2]) == (code, found)
    assert expected in refusal[1]
