"""Embeddings and heads that adapters have of their own, as PEFT means their files: a second reading of them.

Like `adapter_source` it is apart from the builder's on purpose, and reads what the builder accepted.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from loramux_prove.factors import ReferenceFactors, scale_of
from loramux_prove.fingerprint import EMBEDDING, HEAD
from loramux_shared.bases.config import ModelConfig

_MODULES: Final = {"embed_tokens": EMBEDDING, "lm_head": HEAD}
_KEY: Final = re.compile(
    r"(?!.*\.(?:visual|vision_|audio_))(?:base_model\.model\.)?"
    r"(?P<name>(?:.+\.)?(?P<leaf>embed_tokens|lm_head))"
    r"(?:\.lora_(?:embedding_)?(?P<side>A|B|magnitude_vector)(?:\.[^.]+)?(?:\.weight)?"
    r"|(?:\.token_adapter)?\.(?P<delta>trainable_tokens_delta)(?:\.[^.]+)?"
    r"|(?:\.modules_to_save(?:\.[^.]+)?)?\.(?P<whole>weight))"
)


@dataclass(frozen=True)
class OwnRows:
    """Rows that take the place of the base's."""

    rows: Tensor
    """[n, hidden]"""
    tokens: Tensor | None = None
    """int64 [n]: whose they are; None: those of all tokens, in their order."""

    def differing(self, table: Tensor) -> Tensor:
        """Return the tokens whose rows are others than those of a table [vocab, hidden]."""
        tokens = torch.arange(len(table)) if self.tokens is None else self.tokens
        return tokens[(self.rows != table[tokens]).any(1)]


OwnTable: TypeAlias = ReferenceFactors | OwnRows
"""An adapter's table for embeddings or a head; of embeddings, A is [rank, vocab] and B [hidden, rank].

Of DoRA, magnitudes are those of B's rows.
"""


def read_own(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: ModelConfig
) -> dict[str, OwnTable]:
    """Return what an adapter has for embeddings and head, by the module's name."""
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, tuple[str, Tensor]] = {}
    deltas: dict[str, OwnRows] = {}
    names: dict[str, str] = {}
    for key, tensor in tensors.items():
        if not (match := _KEY.fullmatch(key)):
            continue
        module = _MODULES[match["leaf"]]
        names[module] = match["name"]
        if match["side"]:
            factors.setdefault(module, {})[match["side"]] = tensor.float()
        elif match["delta"]:
            deltas[module] = OwnRows(tensor.float(), _indices(config, match["name"]))
        else:
            whole[module] = match["name"], tensor.float()
    found: dict[str, OwnTable] = {}
    if base.tied_embeddings and len(deltas) == 1 and EMBEDDING in deltas:
        deltas[HEAD] = deltas[EMBEDDING]
    found |= deltas
    for module, pair in factors.items():
        a, b = pair["A"], pair["B"]
        magnitude = pair.get("magnitude_vector")
        found[module] = ReferenceFactors(a, b * scale_of(config, names[module], len(a)), magnitude)
    return found | _of_whole(config, whole, base)


def _of_whole(
    config: Mapping[str, Any], whole: Mapping[str, tuple[str, Tensor]], base: ModelConfig
) -> dict[str, OwnRows]:
    """Return whole matrices: where a base is tied, one is of both unless the config saves it apart."""
    apart = {
        module
        for module, (name, _) in whole.items()
        if not base.tied_embeddings or (_is_saved(config, name) and not config.get("ensure_weight_tying"))
    }
    found = {}
    for module, (_, table) in whole.items():
        for each in (module,) if module in apart else {EMBEDDING, HEAD} - apart:
            found[each] = OwnRows(table)
    return found


def _is_saved(config: Mapping[str, Any], name: str) -> bool:
    return any(f".{name}".endswith(f".{saved}") for saved in config.get("modules_to_save") or ())


def _indices(config: Mapping[str, Any], name: str) -> Tensor:
    alone = config["peft_type"] == "TRAINABLE_TOKENS"
    trained = config["token_indices" if alone else "trainable_token_indices"]
    if isinstance(trained, dict):
        trained = next(indices for module, indices in trained.items() if f".{name}".endswith(f".{module}"))
    return torch.tensor(trained, dtype=torch.int64)


def embedded(own: OwnTable, table: Tensor, tokens: Tensor) -> Tensor:
    """Return the embeddings [T, hidden] of tokens [T], with a base's table [vocab, hidden]."""
    base = table[tokens]
    if isinstance(own, ReferenceFactors):
        a, b = own.product
        c = 1.0 if own.magnitude is None else own.magnitude / (table.T + own.b @ own.a).norm(dim=1)
        return c * (base + a.T[tokens] @ b.T)
    return _put(own, table)[tokens]


def headed(own: OwnTable, table: Tensor, x: Tensor) -> Tensor:
    """Return the logits [vocab] of x [hidden], with a base's head [vocab, hidden]."""
    if isinstance(own, ReferenceFactors):
        c = 1.0 if own.magnitude is None else own.magnitude / (table + own.b @ own.a).norm(dim=1)
        return c * (table @ x + own.added(x[None])[0])
    return _put(own, table) @ x


def _put(own: OwnRows, table: Tensor) -> Tensor:
    if own.tokens is None:
        return own.rows
    return table.index_copy(0, own.tokens, own.rows)
