"""What is served under which name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from inference_service.core.sequence import Adapter
from inference_service.serving.adapter_defaults import NO_DEFAULTS, AdapterDefaults
from loramux_shared.access.rights import ACCESS
from loramux_shared.faults import ModelNotFound
from loramux_shared.wording import listed


@dataclass(frozen=True)
class ServedModel:
    """The base, or an adapter on it."""

    name: str
    adapter: Adapter | None = None
    """None for the base, and for an adapter that is merged into the weights."""
    source: str = ""
    """The repository that it was built from, with the revision."""
    digest: str = ""
    """The bundle's; empty for the base."""
    ranks: tuple[int, ...] = ()
    modules: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    defaults: AdapterDefaults = NO_DEFAULTS
    load_time: datetime = field(default_factory=lambda: datetime.now(UTC))
    load_s: float = 0.0
    """Seconds that reading, checking and packing it took."""


class Catalog:
    """The base first, where it is served, then the adapters by name. A caller sees what it may use."""

    def __init__(
        self, generation: int, base_name: str, models: Iterable[ServedModel], load_s: float = 0.0
    ) -> None:
        """List what is served; load_s are the seconds from the start of loading until all of it was ready."""
        self.generation = generation
        self.load_s = load_s
        self.base_name = base_name
        ordered = sorted(models, key=lambda model: (model.name != base_name, model.name))
        self._models = {model.name: model for model in ordered}

    def __iter__(self) -> Iterator[ServedModel]:
        access = ACCESS.get()
        return (model for name, model in self._models.items() if access.may_use(name))

    @property
    def everything(self) -> tuple[ServedModel, ...]:
        """All models, whoever asks; may be asked on another thread."""
        return tuple(self._models.values())

    def get(self, name: str) -> ServedModel:
        """Return a model by its exact name.

        Raises:
            ModelNotFound: listing what is served; never the base instead.
        """
        if name in self._models and ACCESS.get().may_use(name):
            return self._models[name]
        visible = [model.name for model in self]
        near = difflib.get_close_matches(name[:128], visible, n=3)
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ModelNotFound(f"no model {name[:128]!r} is served here.{meant} Served: {listed(visible)}.")
