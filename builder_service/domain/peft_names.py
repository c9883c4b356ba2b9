"""PEFT's reading of names: whether a pattern matches a module, and which field of a config excludes it.

`sandbox` asks it about untrusted patterns; it uses nothing but the standard library, see `sandboxed`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

ALL_LINEAR: Final = "all-linear"

Test: TypeAlias = Callable[[str], Any]


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """Return for each name which patterns match it, by their positions, and what leaves it out.

    The question has ``names``, the patterns of ``rank_pattern`` and ``alpha_pattern``, and those fields of the
    config that choose modules, each as PEFT allows it. ``left_out`` is the field that does, or empty. Where
    patterns cannot be compiled, the answer is only ``problems``: field, pattern and problem of each.
    """
    compiled = _Compiled()
    tests = [
        [compiled.compile(field, pattern, rf"(.*\.)?({pattern})$").match for pattern in question[field]]
        for field in ("rank_pattern", "alpha_pattern")
    ]
    left_out = _left_out(question, compiled)
    if compiled.problems:
        return {"problems": compiled.problems}
    names, (ranks, alphas) = question["names"], tests
    by_rank = [_matching(ranks, name) for name in names]
    # EVA gives A and B the same patterns, one per module: a pattern is matched once.
    same = question["rank_pattern"] == question["alpha_pattern"]
    by_alpha = by_rank if same else [_matching(alphas, name) for name in names]
    return {"rank_pattern": by_rank, "alpha_pattern": by_alpha, "left_out": [left_out(name) for name in names]}


def _matching(tests: Sequence[Test], name: str) -> list[int]:
    return [at for at, test in enumerate(tests) if test(name)]


_NOTHING: Final = re.compile(r"(?!)")


class _Compiled:
    """Compiles patterns, and collects those that are none."""

    def __init__(self) -> None:
        self.problems: list[tuple[str, str, str]] = []

    def compile(self, field: str, pattern: str, text: str) -> re.Pattern[str]:
        """Return a pattern, which stands in a larger text; one that matches nothing, where it is none."""
        try:
            return re.compile(text)
        except (re.error, RecursionError, OverflowError) as problem:
            self.problems.append((field, pattern[:200], str(problem)[:200]))
            return _NOTHING


_EMBEDDING: Final = re.compile(r"(?:.*\.)?(?:embed_tokens|lm_head)")
"""Modules that are no linears to PEFT, or the one for which it makes an exception."""


def _left_out(question: Mapping[str, Any], compiled: _Compiled) -> Callable[[str], str]:
    """Return PEFT's ``check_target_module_exists``, step by step, for the field that says no."""
    excludes = _chooser("exclude_modules", question["exclude_modules"] or [], compiled)
    saved = [
        compiled.compile("modules_to_save", name, rf"(^|.*\.){name}($|\..*)").match
        for name in question["modules_to_save"]
    ]
    targets = question["target_modules"]
    everything = targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR)
    chooses = (lambda _: True) if everything else _chooser("target_modules", targets, compiled)
    in_layers = _layers(question, compiled)
    linear = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    whole = frozenset(targets) if isinstance(targets, list) else frozenset()

    def field(name: str) -> str:
        if excludes(name):
            return "exclude_modules"
        if any(test(name) for test in saved):
            return "modules_to_save"
        if not chooses(name) or (linear and _EMBEDDING.fullmatch(name)):
            return "target_modules"
        # PEFT reads the layer where an entry of the list is a proper end of the module's name.
        asks = not isinstance(targets, str) and name not in whole
        return "layers_to_transform" if asks and not in_layers(name) else ""

    return field


def _chooser(field: str, value: str | Sequence[str], compiled: _Compiled) -> Test:
    """Return the test of a field that is a pattern of whole names, or a list of ends of names."""
    if isinstance(value, str):
        return compiled.compile(field, value, value).fullmatch
    chosen = frozenset(value)
    return lambda name: not chosen.isdisjoint(ends(name))


def ends(name: str) -> list[str]:
    """Return a name, and what is behind each of its dots."""
    parts = name.split(".")
    return [".".join(parts[at:]) for at in range(len(parts))]


def _layers(question: Mapping[str, Any], compiled: _Compiled) -> Test:
    """Return the test whether a module is in one of the layers of ``layers_to_transform``."""
    layers, patterns = question["layers_to_transform"], question["layers_pattern"] or []
    if layers is None or layers == []:
        return lambda _: True
    selected = frozenset([layers] if isinstance(layers, int) else layers)
    texts = [patterns] if isinstance(patterns, str) else patterns
    tests = [
        compiled.compile("layers_pattern", text, rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.").match for text in texts
    ] or [re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.").match]

    def in_layers(name: str) -> bool:
        match = next(filter(None, (test(name) for test in tests)), None)
        return match is not None and int(match["idx"]) in selected

    return in_layers
