"""The replicas of a fleet: names among their addresses are looked up again while they are used."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from loramux.connection import Address, is_name, look_up
from loramux_shared.faults import ServerUnavailable, SettingsInvalid

EVERY_S: Final = 10.0
"""A name is looked up again after this time."""
DOUBT_S: Final = 1.0
"""The shortest time between two look-ups after failures."""


class Members:
    """The replicas of a fleet; names among them are looked up again while they are used, in a thread."""

    def __init__(
        self,
        parts: Sequence[str],
        look: Callable[[str], Iterable[Address]] = look_up,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parts, self._look, self._clock = parts, look, clock
        self._fixed = not any(map(is_name, parts))
        self._lock = threading.Lock()
        self._known: tuple[Address, ...] = ()
        self._looked = self._due = 0.0
        self._looking = False

    @property
    def known(self) -> bool:
        """Return True if `now` answers at once."""
        return bool(self._known) or self._fixed

    def now(self) -> tuple[Address, ...]:
        """Return the replicas; the first time this waits for a name server.

        Raises:
            ServerUnavailable: no name resolves.
        """
        with self._lock:
            if not self._known:
                self._known = self._all()
                self._looked = self._clock()
                self._due = self._looked + EVERY_S
            elif not self._fixed and not self._looking and self._clock() >= self._due:
                self._looking = True
                threading.Thread(target=self._look_again, name="loramux-names", daemon=True).start()
            return self._known

    def doubt(self) -> None:
        """Look names up soon: a replica failed."""
        with self._lock:
            self._due = min(self._due, self._looked + DOUBT_S)

    def _look_again(self) -> None:
        try:
            found = self._all()
        except ServerUnavailable:  # the name server's bad moment: those that were known may well be there
            found = self._known
        with self._lock:
            self._known, self._looking = found, False
            self._looked = self._clock()
            self._due = self._looked + EVERY_S

    def _all(self) -> tuple[Address, ...]:
        found: dict[str, Address] = {}
        missing: SettingsInvalid | None = None
        for part in self._parts:
            try:
                found |= {each.target: each for each in self._look(part)}
            except SettingsInvalid as fault:
                missing = fault
        if not found:
            raise ServerUnavailable(missing.message if missing else "there are no replicas.")
        return tuple(found.values())
