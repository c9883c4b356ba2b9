"""Records of bundles, and the canonical bytes of all that are kept in a store.

::

    bundles/sha256/<digest>/manifest.json              digest = sha256 of this file's bytes; written last
    bundles/sha256/<digest>/model.lora_weights.npy
    bundles/sha256/<digest>/model.lora_config.npy
    bundles/sha256/<digest>/model.vocabulary_weights.npy   where an adapter changes embeddings or head
    bundles/sha256/<digest>/model.score_weights.npy    where it classifies texts
    bundles/sha256/<digest>/model.own_tokens.json      where it has other tokens than the base

A manifest holds nothing but what follows from the adapter's bytes and the build's settings, so the same adapter
has the same digest from every source; the generation records the source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, ValidationError

from loramux_shared.bundle.kinds import kinds_of
from loramux_shared.bundle.modules import BY_ID, NO_LAYER, OF_NO_LAYER, TENSORRT_LLM
from loramux_shared.bundle.proof import Proof
from loramux_shared.deployment import Dtype, Model
from loramux_shared.faults import BundleCorrupt, Finding
from loramux_shared.runtime import Pooling, unset

FORMAT_VERSION: Final = 1
"""Version of records; a manifest has version 2 where older readers would serve something else: `version_of`."""
WEIGHTS_FILE = "model.lora_weights.npy"
CONFIG_FILE = "model.lora_config.npy"
VOCABULARY_FILE = "model.vocabulary_weights.npy"
"""The file of rows outside the layers.

One may be as long as a thousand rows of layers, which are padded alike.
"""
SCORE_FILE: Final = "model.score_weights.npy"
"""The score head of an adapter that classifies texts, float32."""
MANIFEST_FILE = "manifest.json"
REBUILD: Final = "Build the deployment again with --verify."
"""The cure of a damaged store: other builds add only what is missing."""
TEXT_FILES: Final = ("chat_template.jinja", "generation_config.json", "tokenizer_config.json")
"""Files that an adapter may bring beside its weights: template, sampling defaults, stop tokens."""

OWN_TOKENS_FILE: Final = "model.own_tokens.json"
"""An `added_tokens.OwnTokens`, of an adapter that has other tokens than the base."""
ALL_TEXTS: Final = (*TEXT_FILES, OWN_TOKENS_FILE)
"""Files of a bundle that are for text, and not for the device."""

MAX_LABELS: Final = 1024
"""Largest number of labels of a score head."""
MAX_LABEL: Final = 256
"""Characters of the name of a label."""
PROBLEM_TYPES: Final = ("regression", "single_label_classification", "multi_label_classification")
"""Problem types that transformers knows."""
MAX_INVOCATION: Final = 64
"""Tokens from which on an activated adapter acts."""

Sha256 = Field(pattern=r"^[0-9a-f]{64}$")
Tokens = Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...], Field(max_length=MAX_INVOCATION)]


class Record(Model):
    """A frozen record with canonical JSON bytes: sorted keys, no spaces, UTF-8, one final newline."""

    def to_bytes(self) -> bytes:
        """Return the canonical bytes."""
        data = self.model_dump(mode="json")
        return (json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, *, sha256: str | None = None, what: str = "") -> Self:
        """Parse a record; raise BundleCorrupt for no such record, and for another digest where one is known."""
        what = what or cls.__name__.lower()
        if sha256 is not None:
            verify(data, sha256, what)
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise BundleCorrupt(
                f"{what} is not a {cls.__name__} in a known format version: "
                f"{error.error_count()} fields are missing or wrong. {REBUILD}"
            ) from error


class FileDigest(Model):
    """Size in bytes and sha256 of a file."""

    size: int = Field(ge=0)
    sha256: str = Sha256


class Truncation(Model):
    """The loss of a row that was truncated."""

    rank: int = Field(ge=1)
    """The adapter's own."""
    error: float = Field(ge=0, allow_inf_nan=False)
    """Error of the product BA: Frobenius norm of the difference over that of the original."""


class ModuleRow(Model):
    """One row of a bundle: a module of a layer."""

    layer: int = Field(ge=0)
    module_id: int = Field(ge=0)
    module: str
    """TensorRT-LLM's name, for example ``attn_q``."""
    rank: int = Field(ge=0)
    """0 where it has vectors alone."""
    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)
    scale: float = Field(allow_inf_nan=False)
    """alpha/r or alpha/sqrt(r); folded into B already."""
    norm_a: float = Field(ge=0, allow_inf_nan=False)
    """Frobenius norm of A as stored; like the other two, see `builder_service.domain.rules.values`."""
    norm_b: float = Field(ge=0, allow_inf_nan=False)
    """Norm of the scaled B as stored."""
    norm_ba: float = Field(ge=0, allow_inf_nan=False)
    """Norm of the product BA: how much the adapter changes this module."""
    truncation: Truncation | None = None
    """Set where the row approximates one of a higher rank, which the deployment asked for."""
    expert: int | None = Field(default=None, ge=0, exclude_if=unset)
    """Expert of a mixture that has the module; absent of other modules."""
    vectors: int = Field(default=0, ge=0, le=3, exclude_if=lambda vectors: not vectors)
    """Vectors of out_features elements behind B.

    The first c, the second d, the third what rounding took from c. The module's output y becomes c * y + d.
    Absent where there are none.
    """

    @property
    def elements(self) -> int:
        """Return the number of elements of the row, without padding."""
        return self.rank * (self.in_features + self.out_features) + self.vectors * self.out_features

    @property
    def place(self) -> tuple[int, int, int]:
        """Return the key that is unique in a bundle, and by which rows are sorted."""
        return self.layer, self.module_id, -1 if self.expert is None else self.expert

    def columns(self, count: int) -> list[int]:
        """Return the first so many of what the config file says of it."""
        return [self.module_id, self.layer, self.rank, self.vectors, self.place[-1]][:count]


class Coverage(Model):
    """Every tensor of the adapter's file by its key: there is no third kind, the rest was refused."""

    used: tuple[str, ...] = ()
    """The rows were made from these; sorted."""
    redundant: tuple[str, ...] = ()
    """Copies of the base's own tensors, proved equal to them; sorted."""


class Replaced(Model):
    """Rows of the base's embeddings or head that an adapter has others for."""

    module_id: int = Field(ge=0)
    module: str
    tokens: tuple[tuple[int, int], ...]
    """Tokens of the rows: runs of a first token and how many follow one another, ascending, none empty."""
    features: int = Field(ge=1)
    """Length of a row."""

    @property
    def count(self) -> int:
        """Rows."""
        return sum(count for _, count in self.tokens)

    @property
    def elements(self) -> int:
        """Return the number of elements of all rows."""
        return self.count * self.features


class ScoreHead(Model):
    """A linear without a bias on the hidden state of the last token: one score for each label.

    One of an encoder reads the first token's, through a dense layer and an activation; both have biases.
    ModernBERT's has gelu and a norm behind the dense layer; one of token classification reads every token's.
    """

    num_labels: int = Field(ge=1, le=MAX_LABELS)
    hidden_size: int = Field(ge=1)
    problem_type: str | None = Field(default=None, exclude_if=unset)
    """One of `PROBLEM_TYPES`; absent where the adapter does not say."""
    id2label: tuple[str, ...] = Field(default=(), exclude_if=unset)
    """Names of the labels in their order; absent likewise."""
    dense: bool = Field(default=False, exclude_if=lambda dense: not dense)
    """True if the file has the rows of a dense layer before those of labels, and biases as its last column."""
    norm_eps: float | None = Field(default=None, gt=0, allow_inf_nan=False, exclude_if=unset)
    """Epsilon of the norm behind the dense layer, whose weight and bias are two rows between both layers' rows;
    gelu is before it. Absent where there is none."""
    activation: Literal["relu", "gelu"] | None = Field(default=None, exclude_if=unset)
    """Activation behind a dense layer without a norm; absent for tanh."""
    pooling: Literal[Pooling.MEAN, Pooling.ALL] | None = Field(default=None, exclude_if=unset)
    """The states that it reads where it is not one: their mean, or all, each of which has scores then."""

    @property
    def of_tokens(self) -> bool:
        """Return True if it scores every token; biases are the last column of the file then too."""
        return self.pooling is Pooling.ALL

    @property
    def parts(self) -> tuple[int, int]:
        """Return the rows of the file that end the dense layer, and the norm."""
        dense = self.dense * self.hidden_size
        return dense, dense + 2 * (self.norm_eps is not None)

    @property
    def shape(self) -> tuple[int, int]:
        """Return the rows and columns of the file."""
        return self.num_labels + self.parts[-1], self.hidden_size + (self.dense or self.of_tokens)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Return the names of all labels; as transformers calls those that have no name."""
        return self.id2label or tuple(f"LABEL_{number}" for number in range(self.num_labels))


def names_of_labels(labels: Any, count: int) -> tuple[str, ...] | None:
    """Return the names of an ``id2label`` in the order of the labels; None where it does not name so many."""
    if not isinstance(labels, Mapping) or set(labels) != {str(number) for number in range(count)}:
        return None
    names = [labels[str(number)] for number in range(count)]
    fits = all(isinstance(name, str) and len(name) <= MAX_LABEL for name in names)
    return tuple(names) if fits else None


class Manifest(Record):
    """The contents of a bundle; rows are in the order of the npy files, sorted by their places."""

    format_version: Literal[1, 2] = FORMAT_VERSION
    dtype: Dtype
    rows: tuple[ModuleRow, ...]
    replaced: tuple[Replaced, ...] = Field(default=(), exclude_if=lambda parts: not parts)
    """Replaced rows by module id; absent where there are none."""
    vocab: int | None = Field(default=None, ge=1, exclude_if=unset)
    """Rows of its embeddings and columns of its logits; absent where they are as many as the base's."""
    score: ScoreHead | None = Field(default=None, exclude_if=unset)
    """Head that scores texts; absent where the adapter generates text."""
    encodes: bool = Field(default=False, exclude_if=lambda encodes: not encodes)
    """True if the adapter was trained to make vectors of texts, and generates none; absent elsewhere."""
    row_width: int = Field(ge=0)
    """Elements per row of the weights, padding included; 0 where no row is of a layer."""
    config_columns: Literal[3, 4, 5] = 4
    files: dict[str, FileDigest]
    """The npy files, those of `TEXT_FILES` that the adapter brings, and its own tokens where it has any."""
    inputs: dict[str, FileDigest]
    """The adapter's files that the bundle was made from."""
    coverage: Coverage = Coverage()
    """Empty where the bundle was not made from a safetensors file."""
    invocation_tokens: Tokens = Field(default=(), exclude_if=unset)
    """Tokens from which on the adapter acts; none where it acts on everything."""
    base_model_name: str = ""
    """Base that the adapter names as its own."""
    base_model_revision: str = ""
    """The revision of it, where the adapter says one."""
    warnings: tuple[Finding, ...] = ()
    """Warnings without the adapter's name, which is the deployment's choice."""
    proof: Proof | None = None
    """None where the deployment did not ask for one."""

    @property
    def tensors_used(self) -> int:
        """Tensors of the adapter that rows were made from; of npy files, A, B and vectors of every row."""
        return len(self.coverage.used) or sum(2 + row.vectors for row in self.rows)

    @property
    def layer_rows(self) -> tuple[ModuleRow, ...]:
        """The rows of layers: those that the two files of LoRA's have, in their order."""
        return tuple(row for row in self.rows if row.layer != NO_LAYER)

    @property
    def vocabulary_rows(self) -> tuple[ModuleRow, ...]:
        """The others, which come first in the vocabulary's file; what is replaced comes behind them."""
        return tuple(row for row in self.rows if row.layer == NO_LAYER)

    @property
    def npy_files(self) -> tuple[str, ...]:
        """Names of the npy files."""
        return npy_files(self.modules, score=self.score is not None)

    @property
    def weights_bytes(self) -> int:
        """Bytes of A and B of all rows, without padding, of c and d in float32, and of what is replaced."""
        elements = sum(part.elements for part in self.parts)
        elements -= sum(row.vectors * row.out_features for row in self.rows)
        vectors = sum(2 * row.out_features for row in self.rows if row.vectors)
        return elements * self.dtype.itemsize + vectors * Dtype.FLOAT32.itemsize

    @property
    def parts(self) -> tuple[ModuleRow | Replaced, ...]:
        """The rows, and what is replaced."""
        return (*self.rows, *self.replaced)

    @property
    def summary(self) -> AdapterSummary:
        """Return the part of the manifest that a generation records."""
        return AdapterSummary(
            ranks=self.ranks,
            modules=self.modules,
            tensors_used=self.tensors_used,
            weights_bytes=self.weights_bytes,
            bundle_bytes=sum(file.size for file in self.files.values()),
            warnings=tuple(dict.fromkeys(warning.code for warning in self.warnings)),
            texts=tuple(name for name in TEXT_FILES if name in self.files),
            base_model_name=self.base_model_name,
            affine=any(row.vectors for row in self.rows),
            vocab=self.vocab,
            kinds=self.kinds,
            replaced=self.replaced_rows,
            num_labels=None if self.score is None else self.score.num_labels,
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of the adapter: values of `AdapterKind`."""
        modules = {part.module_id for part in self.parts}
        own = self.rows, modules, self.coverage.used, self.invocation_tokens, self.vocab
        return kinds_of(*own, score=self.score, encodes=self.encodes)

    @property
    def replaced_rows(self) -> dict[str, int]:
        """Return the number of rows of embeddings and head that are replaced, by the module's name."""
        return {part.module: part.count for part in self.replaced}

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, ascending."""
        return tuple(sorted({row.rank for row in self.rows}))

    @property
    def modules(self) -> tuple[str, ...]:
        """The distinct modules, by module id."""
        return tuple(name for _, name in sorted({(part.module_id, part.module) for part in self.parts}))


class AdapterSummary(Model):
    """A description of an adapter that needs no look into its bundle."""

    ranks: tuple[int, ...]
    """The distinct ranks, ascending."""
    modules: tuple[str, ...]
    """The distinct modules, by module id."""
    tensors_used: int = Field(ge=0)
    weights_bytes: int = Field(ge=0)
    """Bytes of A and B of all rows in the storage type, without padding, and of c and d in float32."""
    bundle_bytes: int = Field(ge=0)
    """Bytes of all files of the bundle but the manifest."""
    warnings: tuple[str, ...] = ()
    """Codes, each once, in the manifest's order."""
    texts: tuple[str, ...] = ()
    """Files of `TEXT_FILES` that the adapter brings."""
    base_model_name: str = ""
    """Base that the adapter names as its own."""
    affine: bool = Field(default=False, exclude_if=lambda affine: not affine)
    """True if rows have vectors: the adapter multiplies outputs of the base, or adds biases to them."""
    vocab: int | None = Field(default=None, ge=1, exclude_if=unset)
    """Vocabulary size of the manifest."""
    kinds: tuple[str, ...] = Field(default=(), exclude_if=unset)
    """Kinds of the adapter, as in `Manifest.kinds`; empty in generations of older releases."""
    replaced: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict, exclude_if=unset)
    """Numbers of rows of embeddings and head that the adapter replaces, by the module's name."""
    num_labels: int | None = Field(default=None, ge=1, exclude_if=unset)
    """Labels of the score head; absent where the adapter generates text."""

    @property
    def npy_files(self) -> tuple[str, ...]:
        """Names of the npy files of the bundle."""
        return npy_files(self.modules, score=self.num_labels is not None)


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    """Return the sha256 of data in hex."""
    return hashlib.sha256(data).hexdigest()


def version_of(
    parts: Iterable[ModuleRow | Replaced], invocation: Sequence[int] = (), files: Collection[str] = ()
) -> Literal[1, 2]:
    """Return the version of the format of a bundle of such parts and files that acts from these tokens on."""
    own = tuple(parts)
    old = all(part.module_id in TENSORRT_LLM for part in own)
    vectors = any(isinstance(part, ModuleRow) and part.vectors for part in own)
    plain = old and not vectors and not invocation and not {OWN_TOKENS_FILE, SCORE_FILE} & set(files)
    return 1 if plain else 2


VOCABULARY: Final = frozenset(BY_ID[number].name for number in OF_NO_LAYER)
"""Names of modules that are in no layer."""


def npy_files(modules: Iterable[str], *, score: bool = False) -> tuple[str, ...]:
    """Return the names of the npy files that a bundle of some modules, and of a score head, has."""
    names = frozenset(modules)
    files = (WEIGHTS_FILE, CONFIG_FILE) if names - VOCABULARY else ()
    files = (*files, VOCABULARY_FILE) if names & VOCABULARY else files
    return (*files, SCORE_FILE) if score else files


def apart(
    invocation: Sequence[int], modules: Iterable[str], vocab: int | None = None, labels: int | None = None
) -> str:
    """Return why an adapter is never merged into the weights; empty: it may be."""
    if invocation:
        return "acts from its invocation tokens on"
    if vocab is not None:
        return "has a vocabulary of its own"
    if labels is not None:
        return "classifies texts, and generates none"
    return "" if VOCABULARY.isdisjoint(modules) else "has embeddings or a head of its own"


def verify(data: bytes | bytearray | memoryview, sha256: str, what: str) -> None:
    """Raise `BundleCorrupt` unless data has this digest."""
    actual = sha256_hex(data)
    if actual != sha256:
        raise BundleCorrupt(f"{what}: expected sha256 {sha256}, found {actual} ({len(data)} bytes). {REBUILD}")


def bundle_key(digest: str, file: str) -> str:
    """Return the key of a file of a bundle."""
    return f"bundles/sha256/{digest}/{file}"


REMOVAL_FILE: Final = "removal"
"""Empty object of a bundle that is being removed, put first and deleted last. A builder that needs the bundle
puts its manifest, then looks for this; a removal puts this, then looks for a younger manifest."""
