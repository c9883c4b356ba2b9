"""The builds by their request_id, in this run of the builder."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from builder_service.builds.journal import JournalEntry
from builder_service.builds.running import RunningBuild
from loramux_shared.faults import RequestIdReused

MAX_REQUEST_IDS: Final = 10_000


class RequestIds:
    """The newest request ids; one that was forgotten, or is of an earlier run, is found by its content."""

    def __init__(self) -> None:
        self._builds: OrderedDict[str, RunningBuild] = OrderedDict()

    def find(self, entry: JournalEntry) -> RunningBuild | None:
        """Return the build of an entry's request id.

        Raises:
            RequestIdReused: it was used for another deployment.
        """
        known = self._builds.get(entry.request_id) if entry.request_id else None
        if known is not None and known.entry.wish != entry.wish:
            raise RequestIdReused(
                f"request_id {entry.request_id!r} was used for another deployment or content. Draw a new one."
            )
        return known

    def of(self, request_id: str) -> RunningBuild | None:
        """Return the build that a request id led to, while that is remembered."""
        return self._builds.get(request_id)

    def remember(self, request_id: str, running: RunningBuild) -> None:
        """Let a request id lead to a build."""
        if request_id:
            self._builds[request_id] = running
            self._builds.move_to_end(request_id)
            while len(self._builds) > MAX_REQUEST_IDS:
                self._builds.popitem(last=False)

    def forget(self, request_id: str) -> None:
        """Let a request id be used again."""
        self._builds.pop(request_id, None)
