"""The base and the deployment that adapters must fit, and the result of a check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from builder_service.domain.full_tensors import BaseTensors
from builder_service.domain.own_rows import PlannedRows
from builder_service.domain.planned import PlannedRow
from builder_service.domain.rules.tensors import AdapterLimits
from builder_service.domain.safetensors_header import TensorFile
from builder_service.domain.score_heads import PlannedScore
from loramux_shared.bundle.added_tokens import AddedToken, OwnTokens
from loramux_shared.bundle.kinds import kinds_of
from loramux_shared.bundle.manifest import Coverage, FileDigest
from loramux_shared.bundle.modules import BY_NAME
from loramux_shared.deployment import Dtype
from loramux_shared.faults import Finding


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
        score = None if self.score is None else self.score.head
        own = rows, modules, self.coverage.used, self.invocation_tokens, self.vocab
        return kinds_of(*own, score=score, encodes=self.encodes)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings for which the adapter is refused."""
        return tuple(finding for finding in self.findings if is_error(finding))


class TokenComparison(Protocol):
    """The base's own tokens."""

    def compare(self, folder: Path, files: Mapping[str, FileDigest]) -> ComparedTokens:
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


def is_error(finding: Finding) -> bool:
    """Return True for a finding for which an adapter is refused, and False for a warning."""
    return not finding.code.startswith("W_")
