"""A model under one of its names: the base, an adapter, or several adapters with scales."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from inference_service.adapters.defaults import NO_DEFAULTS, AdapterDefaults
from inference_service.core.adapter import Adapter, Mixture
from loramux_shared.bundle.kinds import SILENT
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import Finding, RequestInvalid


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The base, or a version of an adapter on it, under one of its names."""

    name: str
    adapter: Adapter | None = None
    """Its handle in the engine, which all names of a digest share; None for the base, and for an adapter that
    is merged into the weights, or for a mixture."""
    source: str = ""
    """The repository that it was built from, with the revision."""
    digest: str = ""
    """The bundle's; empty for the base."""
    ranks: tuple[int, ...] = ()
    """Like the next two empty while unknown: of an older release's generation, until the adapter was loaded."""
    modules: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    weights_bytes: int | None = None
    """Bytes of its matrices, in the storage type; None while they are not known."""
    defaults: AdapterDefaults | None = NO_DEFAULTS
    """None while nobody has read them."""
    load_time: datetime = field(default_factory=lambda: datetime.now(UTC))
    load_s: float = 0.0
    """Seconds that reading, checking and packing it took."""
    mixture: Mixture | None = None
    """Several adapters with scales; only a request has such a model, see `mixing.mixed`."""
    parts: tuple[ServedModel, ...] = ()
    """Those that a mixture is of."""
    affine: bool = False
    """True if it multiplies outputs of the base, or adds biases to them."""
    vocab: int | None = None
    """Its tokens; None: as many as the base has."""
    num_labels: int | None = None
    """Labels of its score head; None where it generates text."""
    kinds: tuple[str, ...] = ()
    """Kinds of the adapter, as in its manifest; empty for the base."""
    replaced: tuple[tuple[str, int], ...] = ()
    """Numbers of rows of embeddings and head that it replaces, by the module's name."""
    licence: str = ""
    """Licence that its repository names; empty where it names none."""

    @property
    def invocation(self) -> tuple[int, ...]:
        """Return the tokens from which on it acts; none where it acts on everything."""
        return self.adapter.invocation if self.adapter is not None else ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names that a request is counted under."""
        return tuple([part.name for part in self.parts]) or (self.name,)


def display_source(repository: Repository) -> str:
    """Say where a model came from, to everybody who may ask; a folder's path is nobody's business."""
    place = repository.label
    place = Path(place).name if repository.source is SourceKind.LOCAL else place
    return f"{place}@{repository.revision}" if repository.revision else place


def require_text(model: ServedModel) -> None:
    """Refuse to generate with an adapter that was trained for scores or vectors, and never for the base's head.

    Raises:
        RequestInvalid: it was.
    """
    silent = next((each for each in model.parts or (model,) if not SILENT.isdisjoint(each.kinds)), None)
    if silent is None:
        return
    found, fix = "one that makes vectors of texts", "Ask /v1/embeddings for them."
    if silent.num_labels is not None:
        found = "one that classifies texts"
        fix = "Ask /classify, /score or /rerank for its scores, or /v1/embeddings for vectors."
    raise refused_model(silent.name, "a model that generates text", found, fix)


def refused_model(name: str, expected: str, found: str, fix: str = "") -> RequestInvalid:
    """Return the fault of a model that does something else than it is asked for."""
    finding = Finding(code="E_BAD_FIELD", where="model", expected=expected, found=f"{name}, {found}", fix=fix)
    return RequestInvalid("the model does not support this API.", [finding])
