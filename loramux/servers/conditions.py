"""The conditions of rules: each is a small question about an adapter, with words from the rule's row.

A condition returns the keys that it holds for, or `WHOLE` where it holds for the adapter as such; nothing
where it does not hold.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

from loramux.servers.facts import PICKLED, Facts, layer_of
from loramux_shared.adapter_files import CONFIG, INDEX, WEIGHTS

Keys: TypeAlias = frozenset[str]
Condition: TypeAlias = Callable[[Facts, Sequence[str]], Keys]
NONE: Final[Keys] = frozenset()
WHOLE: Final[Keys] = frozenset({""})


def _whole(holds: object) -> Keys:
    return WHOLE if holds else NONE


def no_config(facts: Facts, _: Sequence[str]) -> Keys:
    """There is no config."""
    return _whole(CONFIG not in facts.files)


def config_invalid(facts: Facts, _: Sequence[str]) -> Keys:
    """The config is no JSON object."""
    return _whole(CONFIG in facts.files and facts.config is None)


def no_file(facts: Facts, names: Sequence[str]) -> Keys:
    """None of these files is there."""
    return _whole(facts.files.isdisjoint(names))


def unreadable(facts: Facts, _: Sequence[str]) -> Keys:
    """The header of the weights cannot be read."""
    return _whole(not facts.files.isdisjoint({WEIGHTS, INDEX}) and facts.tensors is None)


def pickled(facts: Facts, _: Sequence[str]) -> Keys:
    """The weights are a pickle alone."""
    return _whole(facts.tensors is None and WEIGHTS not in facts.files and not facts.files.isdisjoint(PICKLED))


def lacks(facts: Facts, names: Sequence[str]) -> Keys:
    """The config lacks one of these fields."""
    return _whole(facts.config is not None and any(name not in facts.config for name in names))


def has(facts: Facts, names: Sequence[str]) -> Keys:
    """One of these fields is set, to anything but what means nothing."""
    return _whole(any(facts.value(name) not in (None, False, 0, "", "none", [], {}) for name in names))


def unset(facts: Facts, names: Sequence[str]) -> Keys:
    """None of these fields is set."""
    return _whole(not has(facts, names))


def is_one_of(facts: Facts, words: Sequence[str]) -> Keys:
    """The first word is a field, and its value is one of the others."""
    return _whole(_text(facts, words[0]) in {word.upper() for word in words[1:]})


def is_none_of(facts: Facts, words: Sequence[str]) -> Keys:
    """The first word is a field, and its value is a text, and none of the others."""
    value = _text(facts, words[0])
    return _whole(value and value not in {word.upper() for word in words[1:]})


def _text(facts: Facts, name: str) -> str:
    value = facts.value(name)
    return value.upper() if isinstance(value, str) else ""


def is_no_whole_number(facts: Facts, names: Sequence[str]) -> Keys:
    """One of these fields is a fraction, or no number."""
    return _whole(any(name in (facts.config or {}) and type(facts.value(name)) is not int for name in names))


def is_zero(facts: Facts, names: Sequence[str]) -> Keys:
    """One of these fields is 0."""
    return _whole(any(name in (facts.config or {}) and facts.value(name) == 0 for name in names))


def lists_other_than(facts: Facts, words: Sequence[str]) -> Keys:
    """The first word is a field that lists names, and one of them is none of the other words."""
    names = facts.value(words[0])
    return _whole(isinstance(names, list) and any(name not in words[1:] for name in names))


def targets_none_of(facts: Facts, names: Sequence[str]) -> Keys:
    """`target_modules` is a list, and no module of these names is in it."""
    targets = facts.value("target_modules")
    leaves = {str(each).rpartition(".")[2] for each in targets} if isinstance(targets, list) else set()
    return _whole(leaves and leaves.isdisjoint(names))


def targets_pattern(facts: Facts, words: Sequence[str]) -> Keys:
    """`target_modules` is a text, and none of these."""
    targets = facts.value("target_modules")
    return _whole(isinstance(targets, str) and targets not in words)


def feedforward_beside_targets(facts: Facts, _: Sequence[str]) -> Keys:
    """`feedforward_modules` of IA3 names a module that `target_modules` does not."""
    feedforward, targets = facts.value("feedforward_modules"), facts.value("target_modules")
    lists = isinstance(feedforward, list) and isinstance(targets, list)
    return _whole(lists and not set(map(str, feedforward)) <= set(map(str, targets)))


def rank_pattern_without_ranks(facts: Facts, _: Sequence[str]) -> Keys:
    """A value of `rank_pattern` is no positive whole number: AdaLoRA has lists of flags there."""
    patterns = facts.value("rank_pattern")
    ranks = patterns.values() if isinstance(patterns, dict) else ()
    return _whole(any(not isinstance(rank, int) or rank <= 0 for rank in ranks))


def rank_above_ceiling(facts: Facts, _: Sequence[str]) -> Keys:
    """A rank of the config is higher than the server is started with."""
    patterns = facts.value("rank_pattern")
    ranks = [facts.value("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    return _whole(any(type(rank) is int and rank > facts.max_rank for rank in ranks))


def alphas_differ(facts: Facts, _: Sequence[str]) -> Keys:
    """`alpha_pattern` has a value other than `lora_alpha`."""
    patterns = facts.value("alpha_pattern")
    alphas = patterns.values() if isinstance(patterns, dict) else ()
    return _whole(any(alpha != facts.value("lora_alpha") for alpha in alphas))


def ranks_differ(facts: Facts, _: Sequence[str]) -> Keys:
    """A or B has another rank than the config gives its module."""
    return frozenset(
        factor.key
        for factor in facts.factors
        if type(rank := facts.rank_of(factor.module)) is int and factor.rank and factor.rank != rank
    )


def ranks_vary(facts: Facts, names: Sequence[str]) -> Keys:
    """A or B has another rank than this field says."""
    rank = facts.value(names[0])
    return frozenset(
        factor.key for factor in facts.factors if type(rank) is int and factor.rank not in (0, rank)
    )


def tensors_empty(facts: Facts, _: Sequence[str]) -> Keys:
    """A or B has no elements, or is no matrix."""
    return frozenset(factor.key for factor in facts.factors if len(factor.shape) < 2 or 0 in factor.shape)


def half_pairs(facts: Facts, _: Sequence[str]) -> Keys:
    """A stands without B, or B without A."""
    sides: dict[str, set[str]] = {}
    for factor in facts.factors:
        sides.setdefault(factor.module, set()).add(factor.side)
    return frozenset(factor.key for factor in facts.factors if len(sides[factor.module]) == 1)


def keys_like(facts: Facts, patterns: Sequence[str]) -> Keys:
    """A key matches one of these patterns."""
    return frozenset(key for key in facts.keys if any(re.search(pattern, key) for pattern in patterns))


def keys_unlike(facts: Facts, patterns: Sequence[str]) -> Keys:
    """A key matches none of these patterns."""
    return facts.keys - keys_like(facts, patterns)


def named_keys(facts: Facts, names: Sequence[str]) -> Keys:
    """A key has the name of an adapter in it, other than these."""
    return frozenset(factor.key for factor in facts.factors if factor.infix and factor.infix not in names)


def layers_beyond(facts: Facts, _: Sequence[str]) -> Keys:
    """A key names a layer that the base lacks."""
    layers = facts.decoder.get("num_hidden_layers")
    if type(layers) is not int:
        return NONE
    return frozenset(key for key in facts.keys if (layer := layer_of(key)) is not None and layer >= layers)


def rows_differ(facts: Facts, _: Sequence[str]) -> Keys:
    """Whole embeddings or a whole head have another number of rows than the base."""
    rows = facts.decoder.get("vocab_size")
    whole = {key: shape for key, shape in (facts.tensors or {}).items() if _WHOLE_ROWS.search(key)}
    return frozenset(key for key, shape in whole.items() if type(rows) is int and shape and shape[0] != rows)


_WHOLE_ROWS: Final = re.compile(r"\.(embed_tokens|lm_head)(\.base_layer|\.modules_to_save\.\w+)?\.weight$")


def v_missing(facts: Facts, _: Sequence[str]) -> Keys:
    """A layer has q_proj without v_proj, or k_proj or v_proj without q_proj."""
    modules = {factor.module for factor in facts.factors}
    alone = {
        module
        for module in modules
        if (module.endswith("q_proj") and f"{module[:-6]}v_proj" not in modules)
        or (module.endswith(("k_proj", "v_proj")) and f"{module[:-6]}q_proj" not in modules)
    }
    return frozenset(factor.key for factor in facts.factors if factor.module in alone)


def base_lacks(facts: Facts, names: Sequence[str]) -> Keys:
    """A base is named, and its config has none of these fields."""
    return _whole(facts.base and all(name not in facts.decoder for name in names))


def base_nested(facts: Facts, _: Sequence[str]) -> Keys:
    """The base has images or sound, and its decoder is a part of it."""
    return _whole(facts.is_nested)


def base_plain(facts: Facts, _: Sequence[str]) -> Keys:
    """The base is a decoder alone, or none is named."""
    return _whole(not facts.is_nested)


CONDITIONS: Final[Mapping[str, Condition]] = {
    condition.__name__: condition
    for condition in (
        no_config, config_invalid, no_file, unreadable, pickled, lacks, has, unset, is_one_of, is_none_of,
        is_no_whole_number, is_zero, lists_other_than, targets_none_of, targets_pattern,
        feedforward_beside_targets, rank_pattern_without_ranks, rank_above_ceiling, alphas_differ,
        ranks_differ, ranks_vary, tensors_empty, half_pairs, keys_like, keys_unlike, named_keys, layers_beyond,
        rows_differ, v_missing, base_lacks, base_nested, base_plain,
    )
}  # fmt: skip


def keys_of(row: Sequence[Sequence[str]], facts: Facts) -> Keys:
    """Return the keys that all conditions of a row hold for; each is a name and its words."""
    found = WHOLE
    for name, *words in row:
        keys = CONDITIONS[name](facts, words)
        if not keys:
            return NONE
        found = keys if found == WHOLE else found if keys == WHOLE else found & keys
    return found
