"""The open descriptors of this process: files, also unlinked ones, and sockets."""

import gc
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loramux_shared.faults import BuildCancelled, Fault


def count_open() -> Counter[str]:
    """Return how many files and sockets are open."""
    found: Counter[str] = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            status = os.fstat(int(entry.name))
        except OSError:  # that of the listing itself
            continue
        found["files"] += stat.S_ISREG(status.st_mode)
        found["sockets"] += stat.S_ISSOCK(status.st_mode)
    return found


@contextmanager
def expect_nothing_open() -> Iterator[list[Fault]]:
    """Yield a list for failures, which are kept with their tracebacks; nothing more is open at the end."""
    before = count_open()
    retained: list[Fault] = []
    yield retained
    assert retained
    gc.collect()  # the clients of some clouds refer to themselves
    now = count_open()
    assert now <= before, f"before {dict(before)}, now {dict(now)}"


def keep_fault(call: Callable[[], object], retained: list[Fault]) -> None:
    try:
        call()
    except Fault as fault:
        retained.append(fault)
    else:
        raise AssertionError("expected a failure")


def cancel_after(count: int) -> Callable[[int], None]:
    """Return a progress that ends a transfer at its first piece after so many bytes."""
    left = count

    def progress(size: int) -> None:
        nonlocal left
        left -= size
        if left < 0:
            raise BuildCancelled("enough")

    return progress
