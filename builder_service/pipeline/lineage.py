"""Lineage: what bases were made from, by the hub, where their names do not show it."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import structlog

from builder_service.domain.origin import QUANTIZED, base_warning
from loramux_shared.bundle.generation import Descent
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import Fault, SourceUnavailable
from loramux_shared.sources.open import Sources

log = structlog.get_logger()

MOST: Final = 3
"""Models of one line that are asked about: a copy, what it is a copy of, and once more."""


@dataclass
class Lineages:
    """Asks for one build, once for each model; a hub that does not answer is not asked again."""

    sources: Sources
    _known: dict[str, tuple[Descent, ...]] = field(default_factory=dict)
    _away: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, named: str, base: Repository, adapters: Iterable[Repository]) -> tuple[Descent, ...]:
        """Return what is known of an adapter's base and of the deployment's, where names do not tell.

        Nobody is asked where neither base nor adapter is from a hub, and no failure is raised.
        """
        repositories = (base, *adapters)
        if base_warning(named, base.label) is None:
            return ()
        if all(repository.source is not SourceKind.HF for repository in repositories):
            return ()
        begin = [named, base.repo] if base.source is SourceKind.HF else [named]
        return tuple(dict.fromkeys(descent for model in begin for descent in self._line(model)))

    def _line(self, model: str) -> list[Descent]:
        line: list[Descent] = []
        for _ in range(MOST):
            found = self._descents(model)
            line += found
            copies = [descent.parent for descent in found if descent.relation == QUANTIZED]
            if len(copies) != 1:
                break
            [model] = copies
        return line

    def _descents(self, model: str) -> tuple[Descent, ...]:
        with self._lock:
            if model not in self._known and not self._away:
                try:
                    self._known[model] = self.sources.descent(model)
                except Fault as fault:
                    self._known[model] = ()
                    self._away = isinstance(fault, SourceUnavailable)
                    log.info("lineage of a base is unknown", model=model, problem=fault.message)
            return self._known.get(model, ())
