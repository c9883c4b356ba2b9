"""The progress of a build, adapter by adapter; and the request to stop a running build."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

from loramux_shared.bundle.generation import AdapterRecord
from loramux_shared.bundle.manifest import Manifest
from loramux_shared.faults import BuildCancelled, BuildInterrupted, BuildTimedOut, Fault, Finding

STOPS: Final = (BuildInterrupted, BuildCancelled, BuildTimedOut)
"""Faults of a build that was requested to end."""


INTERRUPTED: Final = "the builder stopped before the build ended; the build continues at the next start"


class Stage(StrEnum):
    """A stage in the build of an adapter."""

    WAITING = "WAITING"
    FETCHING = "FETCHING"
    VALIDATING = "VALIDATING"
    PROVING = "PROVING"
    CONVERTING = "CONVERTING"
    PUBLISHING = "PUBLISHING"
    DONE = "DONE"
    REFUSED = "REFUSED"


@dataclass(frozen=True)
class AdapterProgress:
    """The build of one adapter."""

    name: str
    stage: Stage = Stage.WAITING
    bytes_done: int = 0
    """Bytes done of the present stage."""
    bytes_total: int = 0
    """Bytes of the present stage; 0: not known yet."""
    digest: str = ""
    ranks: tuple[int, ...] = ()
    modules: tuple[str, ...] = ()
    tensors_used: int = 0
    bundle_bytes: int = 0
    warnings: tuple[Finding, ...] = ()
    reused: bool = False
    repaired: bool = False
    kept: bool = False
    """True if it is unchanged since the served generation, so that nothing was fetched or made."""
    added: bool = False
    """True if the deployment's file does not name it: it was added or pushed before, and stays."""
    kinds: tuple[str, ...] = ()
    """Kinds of the adapter, as in its manifest."""

    def described(self, digest: str, manifest: Manifest, extra: Iterable[Finding] = ()) -> AdapterProgress:
        """Return it with what a manifest says."""
        return replace(
            self,
            digest=digest,
            ranks=manifest.ranks,
            modules=manifest.modules,
            tensors_used=manifest.tensors_used,
            bundle_bytes=sum(file.size for file in manifest.files.values()),
            warnings=(*manifest.warnings, *extra),
            kinds=manifest.kinds,
        )

    def settled(
        self, record: AdapterRecord, extra: Iterable[Finding] = (), *, read_back: bool = False
    ) -> AdapterProgress:
        """Return it as done, with what a generation says; of its warnings that is the codes."""
        summary = record.summary
        state = replace(self, stage=Stage.DONE, bytes_done=0, digest=record.digest, kept=True, reused=read_back)
        if summary is None:
            return replace(state, warnings=tuple(extra))
        return replace(
            state,
            bytes_done=summary.bundle_bytes,
            bytes_total=summary.bundle_bytes,
            ranks=summary.ranks,
            modules=summary.modules,
            tensors_used=summary.tensors_used,
            bundle_bytes=summary.bundle_bytes,
            warnings=(*(Finding(code=code) for code in summary.warnings), *extra),
            kinds=summary.kinds,
        )


class Progress:
    """The progress of a build. Written by the build's threads, read by anyone.

    changed is called after every change, from the thread that made it. After `stop`, the next change that
    the build makes raises one of `STOPS` in its thread.
    """

    def __init__(self, names: Iterable[str], changed: Callable[[], None] = lambda: None) -> None:
        self._adapters = {name: AdapterProgress(name) for name in sorted(names)}
        self._done = dict.fromkeys(self._adapters, 0)
        """Bytes of the present stage; they change too often for a new record each time."""
        self._changed = changed
        self._lock = threading.Lock()
        self._stopped: Fault | None = None

    @property
    def adapters(self) -> tuple[AdapterProgress, ...]:
        """The adapters by name."""
        with self._lock:
            return tuple(map(self._counted, self._adapters.values()))

    def _counted(self, adapter: AdapterProgress) -> AdapterProgress:
        done, total = self._done[adapter.name], adapter.bytes_total
        # A transfer that was begun again counts twice.
        done = min(done, total) if total else done
        return adapter if done == adapter.bytes_done else replace(adapter, bytes_done=done)

    def stop(self, why: Fault | None = None) -> None:
        """Ask the build to end, with one of `STOPS`; without one, it is interrupted. The first call counts."""
        self._stopped = self._stopped or why or BuildInterrupted(INTERRUPTED)

    def check(self) -> None:
        """Raise what the build was asked to end with."""
        why = self._stopped
        if why is not None:
            raise type(why)(why.message)

    def enter(self, name: str, stage: Stage, total: int = 0) -> None:
        """Begin a stage of so many bytes."""
        self.update(name, stage=stage, bytes_done=0, bytes_total=total)

    def advance(self, name: str, count: int) -> None:
        """Count bytes of the present stage."""
        self.check()
        with self._lock:
            self._done[name] += count
        self._changed()

    def counter(self, name: str) -> Callable[[int], None]:
        """Return `advance` for one adapter."""
        return lambda count: self.advance(name, count)

    def update(self, name: str, **changes: Any) -> None:
        """Set fields of an adapter."""
        self.change(name, lambda adapter: replace(adapter, **changes))

    def describe(self, name: str, digest: str, manifest: Manifest, extra: Iterable[Finding] = ()) -> None:
        """Set what a manifest says."""
        self.change(name, lambda adapter: adapter.described(digest, manifest, extra))

    def settle(
        self, name: str, record: AdapterRecord, extra: Iterable[Finding] = (), *, read_back: bool = False
    ) -> None:
        """Say that an adapter stays what it was."""
        self.change(name, lambda adapter: adapter.settled(record, extra, read_back=read_back))

    def warn(self, name: str, warning: Finding) -> None:
        """Append to the warnings of an adapter."""
        self.change(name, lambda adapter: replace(adapter, warnings=(*adapter.warnings, warning)))

    def change(self, name: str, change: Callable[[AdapterProgress], AdapterProgress]) -> None:
        """Give an adapter the progress that a change makes of its present one."""
        self.check()
        with self._lock:
            changed = change(replace(self._adapters[name], bytes_done=self._done[name]))
            self._adapters[name], self._done[name] = changed, changed.bytes_done
        self._changed()

    def include(self, names: Iterable[str]) -> None:
        """Follow adapters that stay beside those of the deployment's file."""
        with self._lock:
            for name in names:
                self._adapters.setdefault(name, AdapterProgress(name, added=True))
                self._done.setdefault(name, 0)
            self._adapters = dict(sorted(self._adapters.items()))


class JointProgress(Progress):
    """The progress of builds that are made together: each shows its own adapters, and each can stop all."""

    def __init__(self, parts: Sequence[Progress]) -> None:
        """Join them; no adapter is in two."""
        super().__init__(())
        self._parts = parts
        self._of = {adapter.name: part for part in parts for adapter in part.adapters}

    @property
    def adapters(self) -> tuple[AdapterProgress, ...]:
        """The adapters of all parts."""
        return tuple(adapter for part in self._parts for adapter in part.adapters)

    def check(self) -> None:
        """Raise what one of the builds was asked to end with."""
        for part in self._parts:
            part.check()

    def advance(self, name: str, count: int) -> None:
        """Count bytes of the present stage."""
        self._of[name].advance(name, count)

    def change(self, name: str, change: Callable[[AdapterProgress], AdapterProgress]) -> None:
        """Change the progress of an adapter."""
        self._of[name].change(name, change)
