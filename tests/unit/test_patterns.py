from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder_service.domain.config_fields import KNOWN
from builder_service.domain.patterns import Matcher, PatternInvalid, PatternsTooSlow, compile_pattern
from tests.golden.hostile.configs import EXPONENTIAL

NAMES = tuple(
    f"{prefix}layers.{layer}.{module}"
    for prefix in ("model.", "model.language_model.", "")
    for layer in (0, 1, 11)
    for module in ("self_attn.q_proj", "self_attn.qkv_proj", "mlp.down_proj")
)
PIECES = (
    "q_proj", "self_attn", "mlp", ".", r"\.", ".*", ".*?", r"\d", r"\d+", r"\w+", "[0-9]", "[^.]+", "(?:q|k)",
    "(qkv)", "|", "^", "$", "layers", "model", "1", "{1,}", "{2}", "{,3}", "?", "+", "*", "(", ")", "(?i)",
    "(?=.*mlp)", "(?!mlp)", "(?<=self_attn)", r"\b", r"\1", "_proj", "down", "++", "(?>a|b)", r"\Z", "{e<=1}",
    "[[:alpha:]]", "(?P<x>q)", "(?P=x)",
)  # fmt: skip


@given(pattern=st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join))
@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
def test_accepted_patterns_mean_what_they_mean_to_peft(pattern):
    """Whatever is accepted matches the same names as `re`, which PEFT uses; what `re` refuses is refused."""
    try:
        test = compile_pattern(pattern)
    except PatternInvalid:
        return
    whole = compile_pattern(pattern, whole=True) if compiles(pattern) else None
    for name in NAMES:
        assert bool(test.match(name)) == bool(re.match(rf"(.*\.)?({pattern})$", name))
        if whole is not None:
            assert bool(whole.fullmatch(name)) == bool(re.fullmatch(pattern, name))


def compiles(pattern: str) -> bool:
    """True when `re` accepts a pattern by itself."""
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def test_a_pattern_cannot_hold_up_the_builder():
    """A pattern that would match for years is given up within the limit, for all names together."""
    matcher = Matcher({EXPONENTIAL: 1})
    begin = time.monotonic()
    for name in NAMES:
        with pytest.raises(PatternsTooSlow):
            matcher.find(f"{name}{name}")
    assert time.monotonic() - begin < 10


def test_all_values_of_a_name_are_found_in_the_file_s_order():
    """The first is what PEFT takes; the others tell that the order matters."""
    matcher = Matcher({"proj": 1, r".*\.q_proj": 2, "self_attn.q_proj": 3})
    assert matcher.find("model.layers.0.self_attn.q_proj") == (2, 3)
    assert matcher.find("model.layers.0.self_attn.k_proj") == ()


def test_every_field_of_peft_is_known():
    """A field of the installed PEFT that is not known would be a warning for every adapter."""
    peft = pytest.importorskip("peft")
    assert set(peft.LoraConfig(task_type="CAUSAL_LM").to_dict()) <= KNOWN
