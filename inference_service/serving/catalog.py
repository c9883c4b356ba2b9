"""What is served under which name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from inference_service.core.sequence import Adapter
from inference_service.serving.brought import NOTHING, Brought
from shared.faults import ModelNotFound


@dataclass(frozen=True)
class ServedModel:
    """The base, or an adapter on it."""

    name: str
    adapter: Adapter | None = None
    """None for the base, and for an adapter that is merged into the weights."""
    digest: str = ""
    """The bundle's; empty for the base."""
    ranks: tuple[int, ...] = ()
    modules: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    brought: Brought = NOTHING
    load_time: datetime = field(default_factory=lambda: datetime.now(UTC))


class Catalog:
    """The base first, where it is served, then the adapters by name."""

    def __init__(self, generation: int, base_name: str, models: Iterable[ServedModel]) -> None:
        self.generation = generation
        self.base_name = base_name
        ordered = sorted(models, key=lambda model: (model.name != base_name, model.name))
        self._models = {model.name: model for model in ordered}

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def get(self, name: str) -> ServedModel:
        """Return a model by its exact name.

        Raises:
            ModelNotFound: listing what is served; never the base instead.
        """
        try:
            return self._models[name]
        except KeyError:
            shown = ", ".join(list(self._models)[:20])
            more = f" and {len(self._models) - 20} more" if len(self._models) > 20 else ""
            raise ModelNotFound(f"no model {name[:128]!r} is served here. Served: {shown}{more}.") from None
