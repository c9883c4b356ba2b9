"""The adapters of a replica as one object: its generation, the bundles of this replica alone, and pins."""

from collections.abc import Callable, Mapping
from functools import partial

from inference_service.adapters.catalog import Catalog, NameChanges
from inference_service.adapters.ports import AdapterResidency
from inference_service.core.adapter import Adapter
from loramux_shared.bundle.generation import AdapterRecord, Generation
from loramux_shared.bundle.names import OWN_NAME, bad_name
from loramux_shared.faults import Finding, RequestInvalid


class AdapterSet:
    """The adapters that a replica serves, and their changes; called on the event loop alone.

    A bundle that was loaded into this replica alone stays beside the deployment's adapters, until one of these
    has its name. A pinned name keeps the version resident that it stands for. What changes residency is posted
    to the engine's thread.
    """

    def __init__(
        self,
        catalog: Catalog,
        residency: AdapterResidency,
        post: Callable[[Callable[[], None]], None],
        draft: Callable[[Generation], None] = lambda _: None,
    ) -> None:
        """Begin with what a catalog lists; post has something called on the engine's thread, as draft is, which
        has it draft as a generation says.
        """
        self.catalog = catalog
        self.residency = residency
        self._post = post
        self._draft = draft
        self._generation = catalog.deployed
        self._own: dict[str, AdapterRecord] = {}
        self._before: dict[str, Adapter] = {}
        self._pinned: dict[str, Adapter] = {}

    def apply(self, generation: Generation) -> NameChanges:
        """Take over a generation of the deployment in one step, and return what that made of the names.

        Requests that have their model keep it, and what they count against. A name that was pinned is pinned in
        its new version; the successor of a version that was resident is brought in. What has no name any more
        leaves, where no sequence is under way on it. Raise ValueError where an adapter is merged into the
        weights, and the generation has others.
        """
        self._generation = generation
        self._own = {name: record for name, record in self._own.items() if generation.names.owner(name) is None}
        changes = self._switch()
        self._post(partial(self._draft, generation))
        return changes

    def check_own(self, name: str) -> None:
        """Check a name for a bundle of this replica alone, by the rules of builders. Raise RequestInvalid where
        the deployment has it, or it cannot be a name.
        """
        others = self._with({own: record for own, record in self._own.items() if own != name})
        finding = bad_name(name, "lora_name")
        if finding is None and (owner := others.names.owner(name)):
            fix = "Load the bundle under another name, or change the deployment through a builder."
            finding = Finding(code="E_BAD_FIELD", where="lora_name", expected=OWN_NAME, found=owner, fix=fix)
        if finding is not None:
            raise RequestInvalid("a bundle is loaded into this replica alone.", [finding])

    def add(self, name: str, record: AdapterRecord) -> None:
        """Register a bundle in this replica alone, or raise what `check_own` does."""
        self.check_own(name)
        self._own[name] = record
        self._switch()

    def remove(self, name: str) -> None:
        """Forget a name of this replica alone."""
        del self._own[name]
        self._switch()

    def is_own(self, name: str) -> bool:
        """Return whether this replica alone has a name."""
        return name in self._own

    def version_before(self, name: str) -> Adapter | None:
        """Return the version that a name had before the present one, if it had one in this replica."""
        return self._before.get(name)

    @property
    def num_pinned(self) -> int:
        """Pinned adapters."""
        return len(self._pinned)

    def is_pinned(self, name: str) -> bool:
        """Return whether a name is pinned."""
        return name in self._pinned

    def pin(self, name: str, adapter: Adapter) -> None:
        """Keep the version of a name resident, and let go the one that was kept before."""
        before = self._pinned.get(name)
        self._pinned[name] = adapter
        self._post(partial(self.residency.pin, adapter))
        if before is not None and before is not adapter:
            self._let_go(before)

    def unpin(self, name: str) -> None:
        """Let the version of a name leave when others need its place; nothing happens where none is pinned."""
        before = self._pinned.pop(name, None)
        if before is not None:
            self._let_go(before)

    def prefetch(self, adapter: Adapter) -> None:
        """Bring an adapter in, if there is room that nothing else takes."""
        self._post(partial(self.residency.prefetch, adapter))

    def _with(self, own: Mapping[str, AdapterRecord]) -> Generation:
        return self._generation.model_copy(update={"adapters": self._generation.adapters | dict(own)})

    def _switch(self) -> NameChanges:
        """Let names stand for what the generation and this replica say now; pins and residency follow."""
        before = {model.name: model.adapter for model in self.catalog.everything if model.adapter}
        changes = self.catalog.apply(self._with(self._own))
        if changes.switched:
            self._follow(before, frozenset(changes.switched))
        served = {model.adapter for model in self.catalog.everything} if changes.removed else set()
        gone = [(name, before[name]) for name in changes.removed if name in before]
        for name, adapter in gone:
            if adapter in served:  # another name refers to the adapter
                self.unpin(name)
        for name, adapter in gone:
            if adapter not in served:
                self.unpin(name)
                self._post(partial(self.residency.drop, adapter))
        for name in changes.removed:
            self._before.pop(name, None)
        return changes

    def _follow(self, before: Mapping[str, Adapter], switched: frozenset[str]) -> None:
        """Pin the new versions of pinned names, and bring in those of names that were resident.

        A version that was resident makes place for its successor when that needs it, least recently used first.
        """
        for model in self.catalog.everything:
            if model.name not in switched or model.adapter is None:
                continue
            self._before[model.name] = before[model.name]
            if model.name in self._pinned:
                self.pin(model.name, model.adapter)
            elif before[model.name].slot is not None:
                self.prefetch(model.adapter)

    def _let_go(self, adapter: Adapter) -> None:
        if adapter not in self._pinned.values():  # several names may refer to one version
            self._post(partial(self.residency.unpin, adapter))
