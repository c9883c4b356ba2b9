import resource
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from builder_service.domain import peft_names
from builder_service.domain.config_fields import BOUNDS, KNOWN, PatternsInvalid, read_names
from builder_service.domain.sandbox import Bounds, TooCostly
from tests.golden.hostile.configs import EXPONENTIAL, GIANT
from tests.support.examples import examples

NAMES = tuple(
    f"{prefix}layers.{layer}.{module}"
    for prefix in ("model.", "model.language_model.", "")
    for layer in (0, 1, 11)
    for module in ("self_attn.q_proj", "self_attn.qkv_proj", "mlp.down_proj")
)
SILENT: dict[str, Any] = {
    **{key: [] for key in ("rank_pattern", "alpha_pattern", "exclude_modules", "modules_to_save")},
    **dict.fromkeys(("layers_to_transform", "layers_pattern")),
    "target_modules": "all-linear",
}
PIECES = (
    "q_proj", "self_attn", "mlp", ".", r"\.", ".*", ".*?", r"\d", r"\d+", r"\w+", "[0-9]", "[^.]+", "(?:q|k)",
    "(qkv)", "|", "^", "$", "layers", "model", "1", "{1,}", "{2}", "{,3}", "?", "+", "*", "(", ")", "(?i)",
    "(?=.*mlp)", "(?!mlp)", "(?<=self_attn)", r"\b", r"\1", "_proj", "down", "++", "(?>a|b)", r"\Z", "{e<=1}",
    "[[:alpha:]]", "(?P<x>q)", "(?P=x)",
)  # fmt: skip
PATTERN = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)
NAMED = st.lists(st.sampled_from(("q_proj", "down_proj", "mlp", *NAMES)), max_size=3)
LAYERS = st.sampled_from((None, [], 0, 1, [0], [1, 11], [0, 1, 11]))
LISTS = st.fixed_dictionaries({
    "target_modules": NAMED,
    "layers_to_transform": LAYERS,
    "layers_pattern": st.sampled_from((None, [], "layers", ["layers"], ["h", "layers"], "lay.rs", "(")),
})  # fmt: skip
TARGETS = LISTS | st.fixed_dictionaries({
    "target_modules": PATTERN,
    "layers_to_transform": st.none(),
    "layers_pattern": st.none(),
})  # fmt: skip
OTHERS = st.fixed_dictionaries({
    "exclude_modules": st.none() | NAMED | PATTERN,
    "modules_to_save": st.sampled_from(([], ["lm_head"], ["mlp"], ["q_proj", "norm"], ["("])),
})  # fmt: skip


@pytest.mark.filterwarnings("ignore:Possible nested set")
@given(targets=TARGETS, others=OTHERS)
@settings(max_examples=examples(100), derandomize=True, database=None)
def test_a_module_is_left_out_where_peft_leaves_it_out(targets, others):
    """The builder selects the same modules as PEFT's own function, however a config names them."""
    utils = pytest.importorskip("peft.tuners.tuners_utils")
    config = SimpleNamespace(target_parameters=None, **targets, **others)
    found = peft_names.answer({**SILENT, **targets, **others, "names": NAMES})
    if "problems" in found:
        return  # PEFT fails too, unless another field decides before it comes to the pattern
    for name, field in zip(NAMES, found["left_out"], strict=True):
        taken = utils.check_target_module_exists(config, name)
        assert (bool(taken) and not isinstance(taken, utils._ExcludedModule)) == (not field)


@pytest.mark.filterwarnings("ignore:Possible nested set")
@given(patterns=st.lists(PATTERN, min_size=1, max_size=3, unique=True))
@settings(max_examples=examples(100), derandomize=True, database=None)
def test_patterns_mean_what_they_mean_to_peft(patterns):
    """The first pattern that is found is the one that PEFT takes."""
    other = pytest.importorskip("peft.utils.other")
    found = peft_names.answer({**SILENT, "rank_pattern": patterns, "names": NAMES})
    for _, pattern, _ in found.get("problems", ()):
        with pytest.raises(other.re.error):
            other.get_pattern_key([pattern], NAMES[0])
    for name, positions in zip(NAMES, found.get("rank_pattern", ()), strict="problems" not in found):
        first = patterns[positions[0]] if positions else name
        assert other.get_pattern_key(patterns, name) == first


@pytest.mark.parametrize(
    ("field", "pattern", "expected"),
    [
        ("rank_pattern", EXPONENTIAL, "more than 0.1 s"),
        ("alpha_pattern", "(?:a?){100000000}", "more than"),
        ("target_modules", EXPONENTIAL, "more than 0.1 s"),
        ("exclude_modules", "(" * 2000 + ")" * 2000, "recursion|parenthesis|nested"),
        ("alpha_pattern", GIANT, ""),
    ],
)
def test_a_pattern_cannot_block_the_builder(field: str, pattern: str, expected: str) -> None:
    """A pattern that would take years or gigabytes is stopped, without an effect on this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    question = {**SILENT, field: pattern if field.endswith("modules") else [pattern]}
    with pytest.raises((PatternsInvalid, TooCostly), match=expected) if expected else nullcontext():
        read_names(NAMES, question, replace(BOUNDS, cpu_s=0.1))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10


def test_all_patterns_of_a_config_share_one_limit() -> None:
    """The time limit holds for all patterns of a config together."""
    bounds = replace(BOUNDS, cpu_s=0.3)
    slow = [f"(?:[a-z._0-9]|[a-z._0-9]){{14}}[^a-z._0-9]{'x' * count}" for count in range(20)]
    read_names(NAMES, {**SILENT, "rank_pattern": slow[:1]}, bounds)
    question = {**SILENT, "rank_pattern": slow, "alpha_pattern": slow, "target_modules": slow[-1]}
    with pytest.raises(TooCostly, match="more than"):
        read_names(NAMES, question, bounds)


def test_memory_is_bounded_too() -> None:
    """A short pattern that asks for gigabytes is refused by that."""
    bounds = Bounds(cpu_s=30.0, memory_bytes=64 << 20)
    with pytest.raises(TooCostly, match="more than 64 MB"):
        read_names(NAMES, {**SILENT, "target_modules": "(?:a?){100000000}"}, bounds)


def test_every_field_of_peft_is_known():
    """A field of the installed PEFT that is not known would be a warning for every adapter."""
    peft = pytest.importorskip("peft")
    assert set(peft.LoraConfig(task_type="CAUSAL_LM").to_dict()) <= KNOWN
