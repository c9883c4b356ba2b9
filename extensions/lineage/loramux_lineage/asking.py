"""Lineage: what bases were made from, by the hub, where their names do not show it."""

import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, get_args

import structlog
from huggingface_hub import HfApi
from huggingface_hub.hf_api import ModelInfo

from builder_service.domain.origin import QUANTIZED, base_warning
from loramux_shared.bundle.generation import Descent
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import Fault, SourceUnavailable
from loramux_shared.sources.hub import HubSource, translated
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
                    self._known[model] = _parents(self.sources, model)
                except Fault as fault:
                    self._known[model] = ()
                    self._away = isinstance(fault, SourceUnavailable)
                    log.info("lineage of a base is unknown", model=model, problem=fault.message)
            return self._known.get(model, ())


def _parents(sources: Sources, model: str) -> tuple[Descent, ...]:
    """Return the hub's public lineage of a model: it is asked once, without a token.

    Raises:
        SourceRefused, RepoNotFound, RepoGated, SourceUnavailable
    """
    if not MODEL.fullmatch(model):
        return ()
    repository = Repository(source=SourceKind.HF, repo=model)
    hub = sources.of(repository)
    if not isinstance(hub, HubSource):
        return ()
    with translated(repository, ""):
        return descent_of(model, HfApi(endpoint=hub.endpoint, token=False).model_info(model, timeout=ASIDE_S))


ASIDE_S: Final = 5.0
"""For an answer that a build can do without."""
MODEL: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
"""The name of a model on a hub."""
PARENTS: Final = 8
"""Parents that are read; merges have several."""
_RELATIONS: Final = get_args(Descent.model_fields["relation"].annotation)
_TAG: Final = "base_model:"


def descent_of(model: str, info: ModelInfo) -> tuple[Descent, ...]:
    """Read what the card says, and what the hub made of it: tags ``base_model:RELATION:MODEL``."""
    base, stated = (getattr(info.card_data, name, None) for name in ("base_model", "base_model_relation"))
    by_relation = [tag.removeprefix(_TAG).split(":") for tag in info.tags or () if tag.startswith(_TAG)]
    tagged = {words[1]: words[0] for words in by_relation if len(words) == 2}
    parents = dict.fromkeys([*(base if isinstance(base, list) else [base]), *tagged])
    names = [parent for parent in parents if isinstance(parent, str) and MODEL.fullmatch(parent)]
    return tuple(
        Descent(model=model, relation=_relation(stated, tagged.get(parent)), parent=parent)
        for parent in names[:PARENTS]
    )


def _relation(*stated: Any) -> Any:
    """Return the first of what is said that is known."""
    return next((relation for relation in stated if relation and relation in _RELATIONS), "")
