"""How names change: with the deployment's generations, and with bundles that this replica alone has."""

from __future__ import annotations

from collections.abc import Mapping

from inference_service.adapters.pins import Pins
from inference_service.adapters.ports import ChangingNames
from inference_service.core.sequence import Adapter
from loramux_shared.bundle.generation import AdapterRecord, Generation
from loramux_shared.bundle.names import OWN_NAME, bad_name
from loramux_shared.faults import Finding, RequestInvalid


class Registry:
    """Takes over generations; on the event loop alone.

    What was loaded into this replica alone stays beside the deployment's adapters, until one of these has its
    name.
    """

    def __init__(self, names: ChangingNames, started: Generation, pins: Pins) -> None:
        """Begin with the generation that names have."""
        self._names = names
        self._generation = started
        self._pins = pins
        self._own: dict[str, AdapterRecord] = {}
        self._before: dict[str, Adapter] = {}

    def take(self, generation: Generation) -> None:
        """Take over a generation of the deployment in one step."""
        self._generation = generation
        self._own = {name: record for name, record in self._own.items() if generation.names.owner(name) is None}
        self._apply()

    def check_own(self, name: str) -> None:
        """Raise `RequestInvalid` where this replica alone may not have a name, by the rules of builders."""
        others = self._with({own: record for own, record in self._own.items() if own != name})
        finding = bad_name(name, "lora_name")
        if finding is None and (owner := others.names.owner(name)):
            fix = "Load the bundle under another name, or change the deployment through a builder."
            finding = Finding(code="E_BAD_FIELD", where="lora_name", expected=OWN_NAME, found=owner, fix=fix)
        if finding is not None:
            raise RequestInvalid("a bundle is loaded into this replica alone.", [finding])

    def add(self, name: str, record: AdapterRecord) -> None:
        """Register a bundle in this replica alone.

        Raises:
            RequestInvalid: the deployment has the name, or it cannot be one.
        """
        self.check_own(name)
        self._own[name] = record
        self._apply()

    def remove(self, name: str) -> None:
        """Forget a name of this replica alone."""
        del self._own[name]
        self._apply()

    def is_own(self, name: str) -> bool:
        """True for a name of this replica alone."""
        return name in self._own

    def version_before(self, name: str) -> Adapter | None:
        """Return the version that a name had before the present one, if it had one in this replica."""
        return self._before.get(name)

    def _with(self, own: Mapping[str, AdapterRecord]) -> Generation:
        return self._generation.model_copy(update={"adapters": self._generation.adapters | dict(own)})

    def _apply(self) -> None:
        before = {model.name: model.adapter for model in self._names.everything if model.adapter}
        changes = self._names.apply(self._with(self._own))
        self._pins.switched(self._switched(before, frozenset(changes.switched)))
        for name in changes.removed:
            self._before.pop(name, None)
        kept = {model.adapter for model in self._names.everything} if changes.removed else set()
        gone = [(name, before[name]) for name in changes.removed if name in before]
        for name, adapter in gone:
            if adapter in kept:  # another name stands for it
                self._pins.unpin(name)
        self._pins.removed((name, adapter) for name, adapter in gone if adapter not in kept)

    def _switched(
        self, before: Mapping[str, Adapter], names: frozenset[str]
    ) -> dict[str, tuple[Adapter, Adapter]]:
        if not names:
            return {}
        found = {
            model.name: (before[model.name], model.adapter)
            for model in self._names.everything
            if model.name in names and model.adapter
        }
        self._before.update((name, versions[0]) for name, versions in found.items())
        return found
