"""The adapters that are loaded, by slot."""

from __future__ import annotations

import itertools

from inference_service.core.sequence import Adapter
from inference_service.lora.weights import AdapterWeights
from shared.faults import ModelNotFound

# A uid is never used twice in a process; 0 is the base.
_uids = itertools.count(1)


class AdapterBank:
    """Adapters by name and by slot."""

    def __init__(self) -> None:
        self.weights: list[AdapterWeights] = []
        """By slot."""
        self._adapters: dict[str, Adapter] = {}

    def load(self, name: str, weights: AdapterWeights) -> Adapter:
        """Put an adapter in a free slot."""
        adapter = Adapter(name=name, uid=next(_uids), slot=len(self.weights))
        self.weights.append(weights)
        self._adapters[name] = adapter
        return adapter

    def get(self, name: str) -> Adapter:
        """Return an adapter by name, or raise `ModelNotFound`."""
        try:
            return self._adapters[name]
        except KeyError:
            raise ModelNotFound(f"no adapter {name!r}") from None

    @property
    def num_bytes(self) -> int:
        """Memory of all adapters."""
        return sum(weights.num_bytes for weights in self.weights)
