"""All rules about one adapter: every violation at once, or the rows of its bundle."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from builder_service.domain.adapter_config import AdapterConfig, parse_config
from builder_service.domain.config_fields import bad_config
from builder_service.domain.dora_tables import with_dora_tables
from builder_service.domain.expansion import expanded
from builder_service.domain.full_tensors import BaseTensors, check_full_tensors, redundant_warning
from builder_service.domain.grouping import LONGEST, Grouping
from builder_service.domain.initial import with_initial
from builder_service.domain.own_rows import PlannedRows, plan_rows
from builder_service.domain.pairs import Lone, Pair
from builder_service.domain.planned import PlannedRow, planned_rows, unchanged, unchanged_warning
from builder_service.domain.rules.config import INVOCATION
from builder_service.domain.rules.encoder_heads import take_head
from builder_service.domain.rules.legal import legal_findings
from builder_service.domain.rules.tensors import (
    EMPTY_FIX,
    AdapterLimits,
    check_pairs,
    sort_tensors,
    tower_warning,
)
from builder_service.domain.rules.values import check_magnitudes, check_values
from builder_service.domain.rules.vectors import check_lone
from builder_service.domain.safetensors_header import HeaderInvalid, TensorFile, TooManyTensors, read_weights
from builder_service.domain.score_heads import PlannedScore, plan_score
from builder_service.domain.vectors import AdapterVectors, VectorReader
from loramux_shared.adapter_files import CONFIG, WEIGHTS
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.families import load_families
from loramux_shared.bases.families.encoders import EncoderConfig
from loramux_shared.bundle.added_tokens import AddedToken, OwnTokens
from loramux_shared.bundle.kinds import kinds_of
from loramux_shared.bundle.manifest import Coverage, FileDigest
from loramux_shared.bundle.modules import BY_NAME, NO_LAYER
from loramux_shared.deployment import Dtype
from loramux_shared.faults import Finding
from loramux_shared.untrusted_json import excerpt
from loramux_shared.wording import listed

MAX_CONFIG = 4 << 20
"""Bytes of a config."""
MAX_TENSORS = 1 << 14
"""Most tensors of an adapter: A and B of seven modules in 1,170 layers. The deepest model here needs 1,764."""


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter after its checks; without errors, it has the content of its bundle too."""

    findings: tuple[Finding, ...]
    file: TensorFile | None = None
    rows: tuple[PlannedRow, ...] = ()
    replaced: tuple[PlannedRows, ...] = ()
    base_model_name: str = ""
    base_model_revision: str = ""
    coverage: Coverage = field(default_factory=Coverage)
    invocation_tokens: tuple[int, ...] = ()
    """Tokens from which on the adapter acts; none: it acts on everything."""
    vocab: int | None = None
    """Tokens of its model; None: as many as the base has."""
    own_tokens: OwnTokens | None = None
    """Tokens of the adapter, where its tokenizer or its vocabulary is another than the base's."""
    score: PlannedScore | None = None
    """Score head, where the adapter classifies texts."""
    encodes: bool = False
    """True if the adapter was trained to make vectors of texts."""

    @property
    def num_labels(self) -> int | None:
        """Return the number of labels of the score head; None where the adapter generates text."""
        return None if self.score is None else self.score.head.num_labels

    @property
    def modules(self) -> frozenset[str]:
        """Names of the modules that it changes."""
        of_rows = [planned.row.module for planned in self.rows]
        return frozenset([*of_rows, *(planned.replaced.module for planned in self.replaced)])

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of the adapter, as the manifest will have them."""
        rows = [planned.row for planned in self.rows]
        modules = {BY_NAME[module].id for module in self.modules}
        tasks = {"classifies": self.score is not None, "encodes": self.encodes}
        return kinds_of(rows, modules, self.coverage.used, self.invocation_tokens, self.vocab, **tasks)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings for which the adapter is refused."""
        return tuple(finding for finding in self.findings if _is_error(finding))


class TokenComparison(Protocol):
    """The base's own tokens."""

    def compared(self, folder: Path, files: Mapping[str, FileDigest]) -> ComparedTokens:
        """Compare the tokenizer among an adapter's files with the base's."""
        ...

    @property
    def last(self) -> int:
        """The base's last token."""
        ...


@dataclass(frozen=True)
class ComparedTokens:
    """The differences of a tokenizer from the base's."""

    findings: tuple[Finding, ...] = ()
    added: tuple[AddedToken, ...] = ()
    """Tokens that it has behind the base's last one."""


@dataclass(frozen=True)
class Rulebook:
    """The base and the deployment that adapters must fit."""

    limits: AdapterLimits
    architectures: tuple[str, ...]
    """Architectures of the base, for example ``LlamaForCausalLM``."""
    dtype: Dtype
    """The storage type of the bundles."""
    base: BaseTensors | None = None
    """For adapters that carry copies of them; None: such adapters are refused."""
    tokens: TokenComparison | None = None
    """For adapters that bring a tokenizer; None: it is not looked at."""
    truncate_to_rank: int | None = None
    """The rank that rows above it are cut to; None: rows above `limits` are refused."""


def check_adapter(
    folder: Path, book: Rulebook, progress: Callable[[int], None] = lambda _: None
) -> CheckedAdapter:
    """Check a folder that holds a config and weights."""
    size = (folder / CONFIG).stat().st_size
    if size > MAX_CONFIG:
        return CheckedAdapter((bad_config("", f"at most {MAX_CONFIG} bytes", f"{size} bytes"),))
    parsed = parse_config((folder / CONFIG).read_bytes())
    if any(finding.code in {"E_MLX", "E_NOT_LORA"} for finding in parsed.findings):
        return CheckedAdapter(parsed.findings)
    found = list(parsed.findings)
    # A config that says nothing lets every rule about the tensors alone speak too.
    config = parsed.config or AdapterConfig(
        kind=parsed.kind, rank=None, alpha=1.0, use_dora=None, lora_bias=None
    )
    try:
        file = read_weights(folder, most_tensors(book.limits.base))
    except TooManyTensors as error:
        return CheckedAdapter((*found, *config.read(())[1], _too_many(str(error), book.limits.base)))
    except HeaderInvalid as error:
        return CheckedAdapter((*found, *config.read(())[1], _no_header(str(error))))
    found += [*_base_findings(config, book), *_invocation_findings(config, book.limits.base)]
    if parsed.config is not None:
        architecture = load_families()[book.limits.base.architecture][0]
        config, wrong = config.with_default_targets(architecture.model_type)
        found += wrong
    if not file.tensors:
        return CheckedAdapter((*found, _nothing(config)))
    return check_tensors(file, config, book, found, progress)


def check_tensors(
    file: TensorFile,
    config: AdapterConfig,
    book: Rulebook,
    found: list[Finding],
    progress: Callable[[int], None],
) -> CheckedAdapter:
    """Check tensors under a config, beside what was found already."""
    base, report = book.limits.base, Grouping()
    head = None
    if isinstance(base, EncoderConfig):
        head = take_head(file, config, base, book.base, report)
        file = head.file
    plain = expanded(file, config.kind, base, report)
    tensors = sort_tensors(plain.file, base, report, config.target_parameters)
    pairs, file = tensors.pairs, tensors.file
    config, unread = config.read([key.name for key in tensors.keys])
    file, pairs = with_initial(file, pairs, config, book.base, report)
    if head is None:
        score, fulls, saved = plan_score(file, tensors.fulls, config, base, report)
    else:
        score, fulls, saved = head.score, tensors.fulls, head.saved
    check_pairs(pairs, config, book.limits, report)
    check_lone(tensors.lone, config, base, book.limits.target_modules, report)
    full = check_full_tensors(file, fulls, saved, base, book.base, report)
    rows = plan_rows(file, full.tables, tensors.tokens, pairs, config, base, report)
    file, pairs, of_dora = with_dora_tables(file, pairs, config, base, book.base, report)
    replaced, vocab = [*rows.planned, *of_dora], rows.vocab
    replaced.sort(key=lambda planned: planned.replaced.module_id)
    own = list(dict.fromkeys(planned.tensor for planned in replaced))
    heads = () if score is None else score.file.origins(score.tensor)
    values = check_values(file, pairs, own, config, base, book.dtype, report, progress)
    large = check_magnitudes(values.parts, base, book.base, report)
    broken = report or any(_is_error(finding) for finding in found)
    vectors = (
        AdapterVectors() if broken else _vectors(pairs, tensors.lone, file, config, book, report, progress)
    )
    found += [*unread, *report.findings()]
    if config.invocation_tokens and (replaced or vocab or any(pair.key.layer == NO_LAYER for pair in pairs)):
        found.append(_activated_vocabulary())
    changes = bool(pairs or replaced or vectors.rows)
    if not changes and not any(_is_error(finding) for finding in found):
        whole = vocab is None and (tensors.lone or tensors.towers or full.redundant)
        found.append(unchanged_warning() if whole else _nothing(config))
    if any(_is_error(finding) for finding in found):
        return CheckedAdapter(tuple(found), file, vocab=vocab)
    planned = planned_rows(values.parts, vectors, base)
    if not changes:
        file, row = unchanged(file, base)
        planned = (row,)
    found += [each for each in values.warnings if each.code != "W_ZERO_B" or not (vectors.rows or score)]
    found += [*large, *vectors.warnings(book.dtype), *redundant_warning((*full.redundant, *vectors.redundant))]
    found += [*tower_warning(tensors.towers), *legal_findings(pairs, tensors.keys, config, base)]
    unused = () if head is None else head.unused
    redundant = {*full.redundant, *tensors.towers, *plain.idle, *vectors.redundant, *unused}
    adapting = [*(tensor for pair in pairs for tensor in pair.tensors), *(lone.vector for lone in tensors.lone)]
    used = _used([*(tensor.name for tensor in adapting), *own], file) | {*heads}
    return CheckedAdapter(
        tuple(found),
        file,
        planned,
        tuple(replaced),
        config.base_model_name,
        config.base_model_revision,
        Coverage(used=tuple(sorted(used - redundant)), redundant=tuple(sorted(redundant))),
        config.invocation_tokens,
        vocab,
        score=score,
        encodes=config.encodes or (base.encodes and score is None),
    )


def _used(names: list[str], file: TensorFile) -> set[str]:
    return {origin for name in names for origin in file.origins(name)}


def _vectors(
    pairs: list[Pair],
    vectors: list[Lone],
    file: TensorFile,
    config: AdapterConfig,
    book: Rulebook,
    report: Grouping,
    progress: Callable[[int], None],
) -> AdapterVectors:
    """Read what stands beside A and B, where all else is right: it may take the base's weights."""
    found, base = AdapterVectors(), book.limits.base
    reader = VectorReader(file, base, book.base, book.dtype, report, progress, config.normalised)
    for pair in pairs:
        if len(pair.tensors) > 2:
            reader.of_pair(pair, config.scale_of(pair.key.name, pair.trained_rank), found)
    for lone in vectors:
        if not lone.is_scale:
            reader.of_bias(lone, found)
    reader.of_scales([lone for lone in vectors if lone.is_scale], found)
    return found


def _is_error(finding: Finding) -> bool:
    return not finding.code.startswith("W_")


def _base_findings(config: AdapterConfig, book: Rulebook) -> list[Finding]:
    """A class of another family is another base, whatever its name."""
    family = _family(config.base_model_class[:LONGEST])
    if not family or not book.architectures or family in map(_family, book.architectures):
        return []
    return [
        Finding(
            code="E_BASE",
            where=f"{CONFIG}: auto_mapping.base_model_class",
            expected=", ".join(book.architectures),
            found=excerpt(config.base_model_class),
            fix="The adapter was trained on another base.",
        )
    ]


def _invocation_findings(config: AdapterConfig, base: ModelConfig) -> list[Finding]:
    """Return findings about invocation tokens that the base lacks.

    No prompt would ever activate the adapter.
    """
    foreign = [str(token)[:20] for token in config.invocation_tokens if token >= base.dims.vocab]
    if not foreign:
        return []
    fix = "The adapter was trained with another tokenizer."
    expected = f"ids below {base.dims.vocab}, the base's vocabulary"
    where = f"{CONFIG}: {INVOCATION}"
    return [Finding(code="E_ALORA", where=where, expected=expected, found=listed(foreign, 5), fix=fix)]


def _activated_vocabulary() -> Finding:
    """PEFT has no activated form of embeddings, and saved matrices act before the invocation too."""
    where, fix = f"{CONFIG}: {INVOCATION}", f"Train without them, or without {INVOCATION}."
    found = "embeddings or a head of its own"
    return Finding(code="E_ALORA", where=where, expected="layers' modules alone", found=found, fix=fix)


def _family(architecture: str) -> str:
    return re.sub(r"(For[A-Z]\w*|LMHeadModel|Model)$", "", architecture)


def _nothing(config: AdapterConfig) -> Finding:
    if not config.target_modules:
        fix = "The adapter targets no modules: train it again with target_modules."
        return Finding(
            code="E_EMPTY_TARGETS", where=f"{CONFIG}: target_modules", found="none, and no tensors", fix=fix
        )
    return Finding(code="E_EMPTY_WEIGHTS", where=WEIGHTS, expected="tensors", found="none", fix=EMPTY_FIX)


def most_tensors(base: ModelConfig) -> int:
    """Return how many tensors an adapter may have: A and B of all modules, and some more."""
    modules = sum(len(group.modules) for groups in base.layer_groups for group in groups)
    return max(MAX_TENSORS, 3 * modules)


def _too_many(count: str, base: ModelConfig) -> Finding:
    fix = "Only adapters of experts have so many, and the base has none: merge it, or take the right base."
    most = f"at most {most_tensors(base)} tensors"
    return Finding(code="E_TENSORS", where=WEIGHTS, expected=most, found=count, fix=fix)


def _no_header(problem: str) -> Finding:
    fix = "The file is truncated, or not a safetensors file: download or save it again."
    return Finding(
        code="E_BAD_WEIGHTS", where=WEIGHTS, expected="a safetensors file", found=problem[:300], fix=fix
    )
