"""The check of an adapter's tensors: passes over one value, in the order of `PASSES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from builder_service.domain.adapter_config import AdapterConfig
from builder_service.domain.dora_tables import with_dora_tables
from builder_service.domain.expansion import expand_tensors
from builder_service.domain.full_tensors import FullTable, FullTensor, check_full_tensors, redundant_warning
from builder_service.domain.grouping import Grouping
from builder_service.domain.initial import with_initial
from builder_service.domain.own_rows import PlannedRows, TokenTensor, plan_rows
from builder_service.domain.pairs import Lone, Pair
from builder_service.domain.peft_kinds.trainable_tokens import TRAINABLE_TOKENS
from builder_service.domain.planned import PlannedRow, planned_rows, unchanged, unchanged_warning
from builder_service.domain.rules.checked import CheckedAdapter, Rulebook, is_error
from builder_service.domain.rules.config import INVOCATION
from builder_service.domain.rules.encoder_heads import take_head
from builder_service.domain.rules.legal import legal_findings
from builder_service.domain.rules.tensors import EMPTY_FIX, check_pairs, sort_tensors, tower_warning
from builder_service.domain.rules.values import Values, check_magnitudes, check_values
from builder_service.domain.rules.vectors import check_lone
from builder_service.domain.safetensors_header import TensorFile
from builder_service.domain.score_heads import PlannedScore, plan_score
from builder_service.domain.tensor_names import LoraKey, TokensKey
from builder_service.domain.vectors import AdapterVectors, VectorReader
from loramux_shared.adapter_files import CONFIG, WEIGHTS
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.families.encoders import EncoderConfig
from loramux_shared.bundle.manifest import Coverage
from loramux_shared.bundle.modules import NO_LAYER
from loramux_shared.faults import Finding


@dataclass
class TensorCheck:
    """Tensors of an adapter, and what the passes that ran so far made of them."""

    file: TensorFile
    """The tensors. A pass that derives tensors from others replaces it by a file that has both."""
    config: AdapterConfig
    rules: Rulebook
    advance: Callable[[int], None]
    """Counts bytes that were read; raises where the build was stopped."""
    findings: list[Finding]
    """Findings in the order of the result."""
    report: Grouping = field(default_factory=Grouping)
    """Violations of tensors, which join the findings when all tensors were read."""
    unread: list[Finding] = field(default_factory=list)
    """Findings about patterns of the config that cannot be read."""
    keys: list[LoraKey] = field(default_factory=list)
    """Keys of the modules that the file adapts."""
    pairs: list[Pair] = field(default_factory=list)
    lone: list[Lone] = field(default_factory=list)
    fulls: list[FullTensor] = field(default_factory=list)
    tokens: list[TokenTensor] = field(default_factory=list)
    towers: tuple[str, ...] = ()
    """Tensors of modules that no text passes."""
    unused: list[str] = field(default_factory=list)
    """Other tensors on which no answer depends."""
    copies: tuple[str, ...] = ()
    """Whole matrices that equal the base's."""
    saved: tuple[str, ...] = ()
    """Modules that the config saves whole, without those of the score head."""
    score: PlannedScore | None = None
    tables: list[FullTable] = field(default_factory=list)
    replaced: list[PlannedRows] = field(default_factory=list)
    vocab: int | None = None
    """Tokens of the adapter's model; None: as many as the base has."""
    values: Values = field(default_factory=lambda: Values([], []))
    magnitudes: list[Finding] = field(default_factory=list)
    """Warnings about the size of the changes."""
    vectors: AdapterVectors = field(default_factory=AdapterVectors)
    rows: tuple[PlannedRow, ...] = ()

    @property
    def base(self) -> ModelConfig:
        """Return the base that the adapter must fit."""
        return self.rules.limits.base

    @property
    def is_refused(self) -> bool:
        """Return True if a finding is an error."""
        return any(map(is_error, self.findings))

    @property
    def changes_base(self) -> bool:
        """Return True if A and B, rows or vectors may change what the base computes."""
        return bool(self.pairs or self.replaced or self.vectors.rows)

    @property
    def chosen(self) -> list[LoraKey | TokensKey]:
        """Return the keys of modules that `target_modules` must choose."""
        only_rows = self.config.kind is TRAINABLE_TOKENS
        return [*self.keys, *(each.key for each in self.tokens if only_rows)]

    @property
    def own_tensors(self) -> list[str]:
        """Return the tensors that rows of embeddings and head are read from, each once."""
        return list(dict.fromkeys(planned.tensor for planned in self.replaced))

    @property
    def redundant(self) -> set[str]:
        """Return the tensors that were left out."""
        return {*self.copies, *self.towers, *self.vectors.redundant, *self.unused}

    @property
    def used(self) -> set[str]:
        """Return the tensors of the adapter's file from which its bundle is made."""
        of_pairs = [tensor.name for pair in self.pairs for tensor in pair.tensors]
        names = [*of_pairs, *(lone.vector.name for lone in self.lone), *self.own_tensors]
        origins = {origin for name in names for origin in self.file.origins(name)}
        return origins if self.score is None else origins.union(self.score.file.origins(self.score.tensor))


def check_tensors(check: TensorCheck) -> CheckedAdapter:
    """Run every pass, and return the rows of the adapter's bundle or the findings that refuse it."""
    for run in PASSES:
        run(check)
    findings, vocab = tuple(check.findings), check.vocab
    if check.is_refused:
        return CheckedAdapter(findings, check.file, vocab=vocab)
    redundant = check.redundant
    coverage = Coverage(used=tuple(sorted(check.used - redundant)), redundant=tuple(sorted(redundant)))
    return CheckedAdapter(
        findings,
        check.file,
        check.rows,
        tuple(check.replaced),
        check.config.base_model_name,
        check.config.base_model_revision,
        coverage,
        check.config.invocation_tokens,
        vocab,
        score=check.score,
        encodes=check.config.encodes or (check.score is None and not check.base.generates),
    )


def _take_encoder_head(check: TensorCheck) -> None:
    """Take the score head of an encoder out of the file."""
    if isinstance(check.base, EncoderConfig):
        head = take_head(check.file, check.config, check.base, check.rules.base, check.report)
        check.file, check.score, check.saved = head.file, head.score, head.saved
        check.unused += head.unused


def _expand_kinds(check: TensorCheck) -> None:
    """Make A and B of the tensors of other kinds than LoRA."""
    plain = expand_tensors(check.file, check.config.kind, check.base, check.report)
    check.file = plain.file
    check.unused += plain.idle


def _sort(check: TensorCheck) -> None:
    """Sort the tensors by what they are."""
    tensors = sort_tensors(check.file, check.base, check.report, check.config.target_parameters)
    check.file, check.keys, check.towers = tensors.file, tensors.keys, tensors.towers
    check.pairs, check.lone = tensors.pairs, tensors.lone
    check.fulls, check.tokens = tensors.fulls, tensors.tokens


def _read_patterns(check: TensorCheck) -> None:
    """Match the patterns of the config against the adapted modules."""
    check.config, check.unread = check.config.read([key.name for key in check.chosen])


def _add_initial(check: TensorCheck) -> None:
    """Replace A and B that were trained beside a part of the base by those of the whole change."""
    check.file, check.pairs = with_initial(
        check.file, check.pairs, check.config, check.rules.base, check.report
    )


def _take_decoder_head(check: TensorCheck) -> None:
    """Take the score head of a decoder out of the whole matrices."""
    if not isinstance(check.base, EncoderConfig):
        check.score, check.fulls, check.saved = plan_score(
            check.file, check.fulls, check.config, check.base, check.report
        )


def _check_modules(check: TensorCheck) -> None:
    """Report modules whose tensors do not fit the config, the base or the deployment."""
    check_pairs(check.pairs, check.config, check.rules.limits, check.report)
    check_lone(check.lone, check.config, check.base, check.rules.limits.target_modules, check.report)


def _compare_copies(check: TensorCheck) -> None:
    """Compare whole matrices with the base's."""
    full = check_full_tensors(check.file, check.fulls, check.saved, check.base, check.rules.base, check.report)
    check.copies, check.tables = full.redundant, full.tables


def _plan_replaced(check: TensorCheck) -> None:
    """Plan the rows of embeddings and head that replace the base's, and those that DoRA makes of pairs."""
    rows = plan_rows(
        check.file, check.tables, check.tokens, check.pairs, check.config, check.base, check.report
    )
    check.file, check.pairs, of_dora = with_dora_tables(
        check.file, check.pairs, check.config, check.base, check.rules.base, check.report
    )
    check.vocab = rows.vocab
    check.replaced = sorted([*rows.planned, *of_dora], key=lambda planned: planned.replaced.module_id)


def _check_numbers(check: TensorCheck) -> None:
    """Read every number of A, B and the replaced rows."""
    check.values = check_values(
        check.file,
        check.pairs,
        check.own_tensors,
        check.config,
        check.base,
        check.rules.dtype,
        check.report,
        check.advance,
    )
    check.magnitudes = check_magnitudes(check.values.parts, check.base, check.rules.base, check.report)


def _read_vectors(check: TensorCheck) -> None:
    """Read the vectors beside A and B, where all else is right: it may take the base's weights."""
    if check.report or check.is_refused:
        return
    rules, config = check.rules, check.config
    reader = VectorReader(
        check.file, check.base, rules.base, rules.dtype, check.report, check.advance, config.normalised
    )
    for pair in check.pairs:
        if len(pair.tensors) > 2:
            reader.of_pair(pair, config.scale_of(pair.key.name, pair.trained_rank), check.vectors)
    for lone in check.lone:
        if not lone.is_scale:
            reader.of_bias(lone, check.vectors)
    reader.of_scales([lone for lone in check.lone if lone.is_scale], check.vectors)


def _add_violations(check: TensorCheck) -> None:
    """Add what was reported about patterns and tensors to the findings."""
    check.findings += [*check.unread, *check.report.findings()]


def _check_invocation(check: TensorCheck) -> None:
    """Refuse invocation tokens beside changes of the vocabulary.

    PEFT has no activated form of embeddings, and saved matrices act before the invocation too.
    """
    of_no_layer = any(pair.key.layer == NO_LAYER for pair in check.pairs)
    if check.config.invocation_tokens and (check.replaced or check.vocab or of_no_layer):
        where, fix = f"{CONFIG}: {INVOCATION}", f"Train without them, or without {INVOCATION}."
        found = "embeddings or a head of its own"
        finding = Finding(code="E_ALORA", where=where, expected="layers' modules alone", found=found, fix=fix)
        check.findings.append(finding)


def _check_changes(check: TensorCheck) -> None:
    """Find an adapter that changes nothing: warn where its tensors say so, and refuse one without tensors."""
    if check.changes_base or check.is_refused:
        return
    has_tensors = check.lone or check.towers or check.copies
    says_so = check.vocab is None and has_tensors
    check.findings.append(unchanged_warning() if says_so else empty_finding(check.config))


def _plan_rows(check: TensorCheck) -> None:
    """Plan the rows of the bundle, of which there is at least one."""
    if check.is_refused:
        return
    check.rows = planned_rows(check.values.parts, check.vectors, check.base)
    if not check.changes_base:
        check.file, row = unchanged(check.file, check.base)
        check.rows = (row,)


def _add_warnings(check: TensorCheck) -> None:
    """Add the warnings about an adapter that is accepted."""
    if check.is_refused:
        return
    acts_otherwise = check.vectors.rows or check.score
    check.findings += [
        *(each for each in check.values.warnings if each.code != "W_ZERO_B" or not acts_otherwise),
        *check.magnitudes,
        *check.vectors.warnings(check.rules.dtype),
        *redundant_warning((*check.copies, *check.vectors.redundant)),
        *tower_warning(check.towers),
        *legal_findings(check.pairs, check.chosen, check.config, check.base),
    ]


PASSES: Final[tuple[Callable[[TensorCheck], None], ...]] = (
    _take_encoder_head,
    _expand_kinds,
    _sort,
    _read_patterns,
    _add_initial,
    _take_decoder_head,
    _check_modules,
    _compare_copies,
    _plan_replaced,
    _check_numbers,
    _read_vectors,
    _add_violations,
    _check_invocation,
    _check_changes,
    _plan_rows,
    _add_warnings,
)
"""The passes of a check; each reads what those before it left."""


def empty_finding(config: AdapterConfig) -> Finding:
    """Return the error of an adapter without tensors."""
    if not config.target_modules:
        fix = "The adapter targets no modules: train it again with target_modules."
        return Finding(
            code="E_EMPTY_TARGETS", where=f"{CONFIG}: target_modules", found="none, and no tensors", fix=fix
        )
    return Finding(code="E_EMPTY_WEIGHTS", where=WEIGHTS, expected="tensors", found="none", fix=EMPTY_FIX)
