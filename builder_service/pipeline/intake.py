"""Intake: the adapters of a build fetched and validated, several at once; nothing leaves the work folder."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

from builder_service.domain.rules.adapter import most_tensors
from builder_service.domain.rules.checked import CheckedAdapter, Rulebook
from builder_service.domain.safetensors_header import HeaderInvalid, read_header
from builder_service.pipeline.context import BuildContext, Space
from builder_service.pipeline.fetch import FetchedAdapter, ListedAdapter, fetch_adapter, gather
from builder_service.pipeline.progress import Progress, Stage
from builder_service.pipeline.validate import ValidAdapter, check_fetched, refuse_any
from loramux_shared.adapter_files import WEIGHTS

HEAVY_FILE_BYTES: Final = 32 << 20
HEAVY_TENSOR_BYTES: Final = 8 << 20
"""The rules hold A and B of one row; rows of larger tensors, in larger files, are looked at one by one."""

Identity: TypeAlias = tuple[tuple[str, str], ...]
"""Names and sha256 of an adapter's files: what, beside the deployment, its bundle follows from."""


@dataclass
class Intake:
    """The incoming adapters of one build."""

    rules: Rulebook
    context: BuildContext
    space: Space
    work: Path
    progress: Progress
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _checks: dict[Identity, Future[CheckedAdapter]] = field(default_factory=dict)

    def take_in(self, listed: Sequence[ListedAdapter]) -> list[ValidAdapter]:
        """Fetch and validate adapters; in their order.

        Raises:
            AdapterInvalid: with every violation of every adapter.
            ResourcesExhausted: the disk has no room for them.
            Fault: what sources raise, of all adapters.
        """
        self.space.check(sum(adapter.size for adapter in listed), "the adapters")
        with ThreadPoolExecutor(self.context.parallel_adapters, "intake") as pool:
            futures = {
                adapter.name: pool.submit(self._take_in, adapter, self.work / f"adapter-{i}")
                for i, adapter in enumerate(listed)
            }
        taken = gather(futures, self.progress)
        refuse_any({adapter.fetched.name: adapter.checked for adapter in taken})
        return taken

    def judge(self, fetched: FetchedAdapter) -> ValidAdapter:
        """Validate an adapter that is in the work folder; raise AdapterInvalid with every violation."""
        checked = self._check(fetched)
        refuse_any({fetched.name: checked})
        return ValidAdapter(fetched, checked)

    def _take_in(self, listed: ListedAdapter, folder: Path) -> ValidAdapter:
        with self.space.writing(listed.size, f"adapter {listed.name!r}"):
            fetched = fetch_adapter(listed, folder, self.progress)
        checked = self._check_once(fetched)
        if checked.errors:
            self.progress.update(listed.name, stage=Stage.REFUSED)
        return ValidAdapter(fetched, checked)

    def _check_once(self, fetched: FetchedAdapter) -> CheckedAdapter:
        """Check an adapter, unless one with the very same files was checked, or is being."""
        if not fetched.files:
            return self._check(fetched)
        with self._lock:
            found = self._checks.get(identity(fetched))
            future = self._checks.setdefault(identity(fetched), Future())
        if found is not None:  # another thread runs the check: this one only waits
            self.progress.enter(fetched.name, Stage.VALIDATING)
            return found.result()
        try:
            checked = self._check(fetched)
        except BaseException as error:
            future.set_exception(error)
            raise
        future.set_result(checked)
        return checked

    def _check(self, fetched: FetchedAdapter) -> CheckedAdapter:
        heavy = self.context.heavy if self._largest_tensor(fetched) > HEAVY_TENSOR_BYTES else nullcontext()
        with heavy, self.context.compute:
            return check_fetched(fetched, self.rules, self.progress)

    def _largest_tensor(self, fetched: FetchedAdapter) -> int:
        """Return the bytes of the largest tensor of a large file; of the file where that is not known."""
        size = max((file.size for file in fetched.files.values()), default=0)
        if size <= HEAVY_FILE_BYTES:
            return 0
        if WEIGHTS not in fetched.files:
            return size
        try:
            tensors = read_header(fetched.folder / WEIGHTS, most_tensors(self.rules.limits.base)).tensors
        except HeaderInvalid:  # which the rules will say
            return 0
        return max((tensor.size for tensor in tensors.values()), default=0)


def identity(fetched: FetchedAdapter) -> Identity:
    """Return what two adapters have in common whose bundles are one."""
    return tuple(sorted((name, file.sha256) for name, file in fetched.files.items()))
