"""The tables of docs/reference/models.md, from the families of bases and the modules of their layers."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.families import load_families
from loramux_shared.bases.family import Architecture, Family
from loramux_shared.bases.formats import FORMATS
from loramux_shared.bases.read import read_fields
from loramux_shared.bundle.modules import FUSED_PATHS
from scripts.pages import replaced, table

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "reference" / "models.md"
COUNTED: Final = PAGE.with_name("parity.json")
"""Written by `pytest --sweep tests/models/test_parity.py --parity docs/reference/parity.json`."""
BACKENDS: Final = {"torch": "torch", "native": "native", "triton": "Triton, in the interpreter"}
SIZES: Final = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 8,
    "vocab_size": 32,
}
"""Sizes of a config with nothing else: all else is as in the family's class."""
KINDS: Final = ("linear_attention", "full_attention") * 4
LAYERS: Final[dict[str, dict[str, Any]]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deberta-v2": {"pos_att_type": "p2c|c2p", "relative_attention": True, "share_att_key": True},
    "granitemoehybrid": {"layer_types": [*KINDS]},
    "helium": {"head_dim": 16},
    "nemotron_h": {"layers_block_type": ["mlp", *KINDS]},
}
"""Kinds of layers and of attention, and sizes of heads, where those of the class are not served."""


def page() -> str:
    """Return the page as it is, with new tables between its marks."""
    text = PAGE.read_text()
    for name, make in TABLES.items():
        text = replaced(text, name, make())
    return text


def families() -> str:
    """Return a line for each family."""
    names: defaultdict[Family, list[str]] = defaultdict(list)
    for architecture, family in _decoders():
        names[family].append(f"`{architecture.name}`")
        if not family.models:
            raise ValueError(f"{architecture.name}: its Family lacks the words for docs/reference/models.md")
    return "".join(f"- {family.models}: {', '.join(each)}\n" for family, each in names.items())


def modules() -> str:
    """Return the modules that most bases have, and a line for each other set: how it differs from them."""
    having: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for architecture, _ in _decoders():
        having[_modules(small(architecture))].append(f"`{architecture.name}`")
    usual, *others = sorted(having, key=lambda each: -len(having[each]))
    lines = [f"- {_by_parent(usual)}\n"]
    for each in others:
        lost = _by_parent(name for name in usual if name not in each)
        more = _by_parent(name for name in each if name not in usual)
        differs = [f"without {lost}"] * bool(lost) + [f"also {more}"] * bool(more)
        lines.append(f"- {', '.join(having[each])}: {'; '.join(differs)}\n")
    return "".join(lines)


def formats() -> str:
    """Return a row for each format of weights of few bits."""
    rows = [(", ".join(f"`{method}`" for method in each.methods), each.reads) for each in FORMATS]
    return table(("`quant_method`", "what is read"), rows)


def parity() -> str:
    """Return how many answers were equal with each backend, and where some were not."""
    counted = json.loads(COUNTED.read_text())
    tried, exact = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for name, backend, _, count, equal in counted["counts"]:
        tried[name, backend] += count
        exact[name, backend] += equal
    keys = {name: [key for key in tried if key[1] == name] for name in BACKENDS}
    totals = ", ".join(
        f"{words} {sum(exact[key] for key in keys[name])} of {sum(tried[key] for key in keys[name])}"
        for name, words in BACKENDS.items()
    )
    unequal = [
        f"- `{name}`, {BACKENDS[backend]}: {exact[name, backend]} of {tried[name, backend]}\n"
        for name, backend in sorted(tried)
        if exact[name, backend] != tried[name, backend]
    ]
    architectures = len({name for name, _ in tried})
    oracles = ", ".join(f"{name} {number}" for name, number in counted["oracles"].items())
    equal = f"Exact answers of {architectures} architectures, compared with {oracles}: {totals}.\n"
    return equal + ("\nNot exact:\n\n" + "".join(unequal) if unequal else "")


def _decoders() -> list[tuple[Architecture, Family]]:
    """Return the architectures that are no encoders, with their families."""
    return [each for each in load_families().values() if not small(each[0]).encodes]


def small(architecture: Architecture) -> ModelConfig:
    """Return a small decoder of an architecture, as its family reads it."""
    fields: dict[str, Any] = {"architectures": [architecture.name], "model_type": architecture.model_type}
    fields |= LAYERS.get(architecture.model_type, {})
    return read_fields(fields | ({"text_config": SIZES} if architecture.nested else SIZES))


def _modules(model: ModelConfig) -> tuple[str, ...]:
    """Return what adapters of a base may have, in the order of computation; what is fused comes last."""
    named = dict.fromkeys(name for group in model.groups for name in group.modules)
    own = {usual: name for name, usual in model.renamed}
    fused = [own.get(path, path) for path in FUSED_PATHS if path.rpartition(".")[2] in model.dims.fused]
    return (*(model.path(name) for name in named), *fused)


def _by_parent(paths: Iterable[str]) -> str:
    """Return modules with those of a parent together, as a shell has them: `mlp.{up_proj,down_proj}`."""
    leaves: defaultdict[str, list[str]] = defaultdict(list)
    for path in paths:
        parent, dot, leaf = path.rpartition(".")
        leaves[parent + dot].append(leaf)
    each = ((parent, own[0] if len(own) == 1 else f"{{{','.join(own)}}}") for parent, own in leaves.items())
    return ", ".join(f"`{parent}{leaf}`" for parent, leaf in each)


TABLES: Final[dict[str, Callable[[], str]]] = {
    "families": families,
    "formats": formats,
    "modules": modules,
    "parity": parity,
}
