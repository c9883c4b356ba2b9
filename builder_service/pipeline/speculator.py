"""The check of a draft model when its deployment is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Final

from builder_service.domain.tokens import NoTokens, read_object, tokens_of
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.memory import count_weights
from loramux_shared.bundle.generation import BaseRecord, SpeculatorRecord
from loramux_shared.deployment import Speculator
from loramux_shared.faults import DeploymentInvalid, Fault, Finding
from loramux_shared.sources.checkpoint import Base
from loramux_shared.sources.files import scratch
from loramux_shared.sources.open import Sources
from loramux_shared.wording import listed

if TYPE_CHECKING:
    from builder_service.pipeline.making import Workshop

TOKENIZER: Final = "tokenizer.json"


def record_speculator(speculator: Speculator, base: Base, workshop: Workshop) -> SpeculatorRecord:
    """Return the record of a draft model that fits a base.

    Raises:
        DeploymentInvalid: it does not fit, with every reason.
        Fault: what its source raises.
    """
    sources = workshop.context.sources
    try:
        draft = workshop.describe(speculator.model)
        findings = list(_misfits(draft, base, sources))
    except Fault as fault:
        raise fault.with_message(f"runtime.speculator: {fault.message}") from fault
    if findings:
        raise DeploymentInvalid("the draft model does not fit the base", findings)
    return SpeculatorRecord(model=draft.record, tokens=speculator.tokens)


def _misfits(draft: Base, base: Base, sources: Sources) -> Iterator[Finding]:
    if not _is_plain(base.model):
        yield _finding(
            "", "nothing, for the base is no decoder whose layers all attend", base.model.architecture
        )
    if not _is_plain(draft.model):
        yield _finding("model", "a decoder whose layers all attend", draft.model.architecture)
    numbers, most = count_weights(draft.model), count_weights(base.model)
    if numbers > most:
        yield _finding("model", f"at most the {most:,} weights of the base", f"{numbers:,}")
    if draft.record.files.get(TOKENIZER) == base.record.files.get(TOKENIZER) is not None:
        return
    own, others = (_tokens(record, sources) for record in (draft.record, base.record))
    if own != others:
        differing = [token for token, _ in sorted(own.items() ^ others.items(), key=lambda each: each[1])]
        found = f"others for {listed([repr(token) for token in dict.fromkeys(differing)], 3)}"
        yield _finding("model", "the tokens of the base, with the same ids", found)


def _is_plain(model: ModelConfig) -> bool:
    return not model.encodes and not model.state_bytes(1)


def _finding(field: str, expected: str, found: str) -> Finding:
    where = f"runtime.speculator.{field}".removesuffix(".")
    fix = "Name a smaller base of the same family, or leave runtime.speculator out."
    return Finding(code="E_BAD_FIELD", where=where, expected=expected, found=found, fix=fix)


def _tokens(base: BaseRecord, sources: Sources) -> dict[str, int]:
    """Return the ids of a base's tokens.

    Raises:
        DeploymentInvalid: it has no tokenizer.json that says them.
    """
    source = sources.of(base.source)
    what = f"{TOKENIZER} of {base.source.label}: expected a tokenizer, to compare it with the base's"
    try:
        with closing(source.resolve(base.source)) as resolved, scratch(sources.work_dir) as folder:
            source.fetch(resolved, [TOKENIZER] if TOKENIZER in base.files else [], folder)
            fields = read_object(str(folder / TOKENIZER))
        found, own = (tokens_of(TOKENIZER, each) for each in (fields, fields | {"added_tokens": None}))
    except (OSError, NoTokens) as error:
        why = error if isinstance(error, NoTokens) else type(error).__name__
        raise DeploymentInvalid(f"{what}; found none that can be read ({why})") from error
    if not own:
        raise DeploymentInvalid(f"{what}; found none that can be read (it has no vocabulary)")
    return found
