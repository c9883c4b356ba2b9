"""Pins of names: whatever version a name stands for stays resident."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from inference_service.adapters.ports import Residency
from inference_service.core.sequence import Adapter


class Pins:
    """Which names are pinned. Called on the event loop; what follows of it happens on the engine's thread."""

    def __init__(self, residency: Residency, post: Callable[[Callable[[], None]], None]) -> None:
        self._residency = residency
        self._post = post
        self._pinned: dict[str, Adapter] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._pinned

    def __len__(self) -> int:
        return len(self._pinned)

    def pin(self, name: str, adapter: Adapter) -> None:
        """Keep the version of a name resident, and let go the one that was kept before."""
        before = self._pinned.get(name)
        self._pinned[name] = adapter
        self._post(partial(self._residency.pin, adapter))
        if before is not None and before is not adapter:
            self._let_go(before)

    def unpin(self, name: str) -> None:
        """Let the version of a name leave when others need its place; nothing happens where none is kept."""
        before = self._pinned.pop(name, None)
        if before is not None:
            self._let_go(before)

    def switched(self, versions: Mapping[str, tuple[Adapter, Adapter]]) -> None:
        """Follow names to their new versions: pinned ones are pinned, and what was in use is brought in.

        A version that was resident makes place for its successor when that needs it, least recently used first.
        """
        for name, (before, after) in versions.items():
            if name in self._pinned:
                self.pin(name, after)
            elif before.slot is not None:
                self.prefetch(after)

    def removed(self, adapters: Iterable[tuple[str, Adapter]]) -> None:
        """Let names that are no more leave at once, where nobody is under way on them."""
        for name, adapter in adapters:
            self.unpin(name)
            self._post(partial(self._residency.drop, adapter))

    def prefetch(self, adapter: Adapter) -> None:
        """Bring an adapter in, if there is room that nobody has."""
        self._post(partial(self._residency.prefetch, adapter))

    def _let_go(self, adapter: Adapter) -> None:
        if adapter not in self._pinned.values():  # names may stand for one version
            self._post(partial(self._residency.unpin, adapter))
