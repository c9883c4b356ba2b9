"""A build as JSON lines: as many bytes as things happen, however many adapters there are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from loramux.cli.documents import emit_line
from loramux.records import AdapterInfo, DeploymentInfo, DeploymentState


class BuildLines:
    """Prints the states of one build: the first and the last whole, between them the adapters that changed."""

    def __init__(self) -> None:
        self._adapters: dict[str, AdapterInfo] = {}
        self._last: DeploymentInfo | None = None

    def tell(self, info: DeploymentInfo) -> None:
        """Print what is new in a state; nothing where nothing is."""
        changed = tuple(adapter for adapter in info.adapters if self._is_new(adapter))
        rest = replace(info, adapters=())
        if rest == self._last and not changed:
            return
        self._last = rest
        self._adapters |= {adapter.name: adapter for adapter in changed}
        ended = info.state is not DeploymentState.BUILDING
        stages = Counter(adapter.stage.value for adapter in info.adapters)
        emit_line({"deployment": info if ended else replace(info, adapters=changed), "stages": stages})

    def _is_new(self, adapter: AdapterInfo) -> bool:
        told = self._adapters.get(adapter.name)
        return adapter is not told and adapter != told
