"""The kind of an adapter, in words for people and machines, derived from its manifest alone.

The first words say what its rows are, the others where or when it acts. Which method made them is known by the
keys of its tensors, as PEFT names them; npy files of TensorRT-LLM's converters have none, and are LoRA or DoRA.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from enum import StrEnum
from typing import Final, Protocol

from loramux_shared.bundle.modules import BY_ID, OF_EXPERTS, OF_NO_LAYER


class AdapterKind(StrEnum):
    """A word for what an adapter is; most have one, some have several."""

    LORA = "lora"
    ADALORA = "adalora"
    VERA = "vera"
    LOHA = "loha"
    LOKR = "lokr"
    MISS = "miss"
    DORA = "dora"
    """Its rows have lengths of their own."""
    IA3 = "ia3"
    """It scales outputs."""
    BIAS = "bias"
    """It adds to outputs, or has other biases than the base."""
    EXPERTS = "experts"
    """It changes experts of a mixture."""
    EMBEDDING = "embedding"
    """It changes embeddings, by LoRA or by rows of its own."""
    HEAD = "head"
    """The same of the head."""
    TOKENS = "tokens"
    """It has tokens that the base does not have, or lacks some."""
    ACTIVATED = "activated"
    """It acts from its invocation tokens on."""
    CLASSIFIER = "classifier"
    """It scores texts, and generates none."""
    TOKEN_CLASSIFIER = "token-classifier"  # noqa: S105 - no secret
    """It scores the tokens of texts, and generates none."""
    ENCODER = "encoder"
    """It makes vectors of texts, and generates none."""


SILENT: Final = frozenset(
    {AdapterKind.CLASSIFIER.value, AdapterKind.TOKEN_CLASSIFIER.value, AdapterKind.ENCODER.value}
)
"""Kinds that generate no text."""
_MARKS: Final = tuple(
    (kind, re.compile(rf"\.{key}$" if kind is AdapterKind.BIAS else rf"\.{key}(\.|$)", re.MULTILINE))
    for kind, key in (
        (AdapterKind.ADALORA, "lora_E"),
        (AdapterKind.VERA, "vera_lambda_[bd]"),
        (AdapterKind.LOHA, "hada_w[12]_[ab]"),
        (AdapterKind.LOKR, "lokr_w[12](_[ab])?"),
        (AdapterKind.MISS, "miss_block"),
        (AdapterKind.DORA, "lora_magnitude_vector"),
        (AdapterKind.IA3, "ia3_l"),
        (AdapterKind.BIAS, "bias"),
    )
)
"""Ends of the keys of tensors that only one kind has; an adapter's name may follow."""
_OF_HEAD: Final = re.compile(r"\.(classifier|pooler|head)\.")
"""Keys of the score head of an encoder, whose biases are no adapter's."""
_METHODS: Final = frozenset({kind for kind, _ in _MARKS} - {AdapterKind.BIAS})
"""Those of which an adapter has one; where none is known, A and B are plain LoRA."""


class Row(Protocol):
    """A row of a bundle."""

    @property
    def rank(self) -> int:
        """Return the rank of the product; 0 where it has none."""
        ...

    @property
    def vectors(self) -> int:
        """Return the number of vectors."""
        ...


class Head(Protocol):
    """A score head."""

    @property
    def of_tokens(self) -> bool:
        """Return True if it scores every token."""
        ...


def kinds_of(
    rows: Sequence[Row],
    modules: Collection[int],
    keys: Iterable[str],
    invocation: Sequence[int],
    vocab: int | None = None,
    *,
    score: Head | None = None,
    encodes: bool = False,
) -> tuple[str, ...]:
    """Return what an adapter is, in the order of `AdapterKind`.

    Args:
        rows: of its bundle.
        modules: ids of those that it changes.
        keys: of the tensors that rows were made from; none where these had no names.
        invocation: from which tokens on it acts.
        vocab: its tokens, where it has others than the base.
        score: its score head, where it has one.
        encodes: whether it was trained to make vectors.
    """
    found = _methods_of(rows, [key for key in keys if score is None or not _OF_HEAD.search(key)])
    if not OF_EXPERTS.isdisjoint(modules):
        found.add(AdapterKind.EXPERTS)
    found |= {AdapterKind(BY_ID[number].name) for number in OF_NO_LAYER.intersection(modules)}
    if vocab is not None:
        found.add(AdapterKind.TOKENS)
    if invocation:
        found.add(AdapterKind.ACTIVATED)
    if score is not None:
        found.add(AdapterKind.TOKEN_CLASSIFIER if score.of_tokens else AdapterKind.CLASSIFIER)
    if encodes:
        found.add(AdapterKind.ENCODER)
    return tuple(kind.value for kind in AdapterKind if kind in found)


def _methods_of(rows: Sequence[Row], keys: Sequence[str]) -> set[AdapterKind]:
    """Return the methods that made the rows, by the keys of the tensors or, without keys, by the rows."""
    names = "\n".join(keys)
    found = {kind for kind, mark in _MARKS if mark.search(names)}
    if not names and any(row.vectors for row in rows):
        found.add(AdapterKind.DORA)
    if any(row.rank for row in rows) and found.isdisjoint(_METHODS):
        found.add(AdapterKind.LORA)
    return found
