"""Fetch: adapter repositories at their revisions, into the work folder."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from builder_service.domain.rules.files import extra_files, file_findings
from builder_service.domain.rules.texts import too_large
from builder_service.pipeline.context import Space
from builder_service.pipeline.progress import STOPS, Progress, Stage
from loramux_shared.adapter_files import wanted_files
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.deployment import Repository
from loramux_shared.faults import Fault, Finding, SignatureInvalid, SourceRefused
from loramux_shared.signatures import MAX_SIGNATURE, SIGNATURE, signatures
from loramux_shared.sources.base import Resolved, Source, about
from loramux_shared.sources.licence import README, licence_in, reads_readme
from loramux_shared.sources.open import Sources
from loramux_shared.wording import listed

T = TypeVar("T")

MAX_PARALLEL_FETCHES: Final = 4
"""Adapters that are fetched at once."""
MAX_ADAPTER_BYTES: Final = 8 << 30
"""Largest adapter; a rank-64 adapter of a 70B base has about 1.6e9 bytes."""


@dataclass(frozen=True)
class FetchedAdapter:
    """An adapter's files in the work folder, or why there are none."""

    name: str
    folder: Path
    source: Repository
    """Repository with the final revision, where files were fetched, and without a signed address's query."""
    files: Mapping[str, FileDigest]
    findings: tuple[Finding, ...] = ()
    warnings: tuple[Finding, ...] = ()
    """About files that are there and not used."""
    listing: str | None = None
    """The source's description of the files, see `Resolved.digest`."""
    licence: str = ""
    """Licence that the repository names."""


@dataclass(frozen=True)
class ListedAdapter:
    """An adapter's repository at its revision; nothing was fetched, unless its source can list nothing else."""

    name: str
    source: Source
    resolved: Resolved
    selected: tuple[str, ...]
    """The files that will be fetched."""
    findings: tuple[Finding, ...] = ()
    """Why there are none."""
    signed_by: tuple[str, ...] = ()
    """Required signers of the files; empty where none are required."""

    @property
    def size(self) -> int:
        """Bytes that will be fetched."""
        return self.resolved.size(self.selected)

    @property
    def digest(self) -> str | None:
        """Return the source's description of the files, see `Resolved.digest`; None where they are refused."""
        return self.resolved.digest(self.selected) if self.selected else None


@contextmanager
def list_adapters(
    adapters: Mapping[str, Repository],
    sources: Sources,
    space: Space,
    progress: Progress,
    signed_by: tuple[str, ...] = (),
) -> Iterator[list[ListedAdapter]]:
    """Yield every adapter's listing in the order of their names, made several at once; closed at the end.

    Raises:
        ResourcesExhausted: the disk has no room for the archives whose listings are in them.
        Fault: what sources raise, of all adapters: see `join_faults`.
    """
    with ExitStack() as listings:
        with ThreadPoolExecutor(MAX_PARALLEL_FETCHES, "list") as pool:
            futures = {
                name: pool.submit(_list, name, repository, sources, space, progress, listings, signed_by)
                for name, repository in sorted(adapters.items())
            }
        yield gather(futures, progress)


def fetch_adapters(
    adapters: Mapping[str, Repository],
    sources: Sources,
    space: Space,
    work: Path,
    progress: Progress,
    signed_by: tuple[str, ...] = (),
) -> list[FetchedAdapter]:
    """List and fetch every adapter, several at once, by name; raise what sources do, see `join_faults`."""
    with list_adapters(adapters, sources, space, progress, signed_by) as listed:
        with ThreadPoolExecutor(MAX_PARALLEL_FETCHES, "fetch") as pool:
            futures = {
                adapter.name: pool.submit(fetch_adapter, adapter, work / f"adapter-{i}", progress)
                for i, adapter in enumerate(listed)
            }
        return gather(futures, progress)


def gather(futures: Mapping[str, Future[T]], progress: Progress) -> list[T]:
    """Wait for what is done for each adapter, and return the results in their order.

    Raises:
        Fault: those of all adapters, see `join_faults`; that the build was stopped comes before them.
    """
    faults = {}
    for name, future in futures.items():
        error = future.exception()
        if isinstance(error, Fault) and not isinstance(error, STOPS):
            faults[name] = error
        elif error is not None:
            raise error
    for name in faults:
        progress.update(name, stage=Stage.REFUSED)
    if faults:
        raise join_faults(faults)
    return [future.result() for future in futures.values()]


def join_faults(faults: Mapping[str, Fault]) -> Fault:
    """Return the faults of adapters as one.

    Of several there is one finding each, whose code is the reason. The reason of the whole is the first of
    those that trying again does not cure, so that nobody tries again in vain.
    """
    if len(faults) == 1:
        [(name, fault)] = faults.items()
        return fault.with_message(f"adapter {name!r}: {fault.message}")
    lasting = [fault for fault in faults.values() if fault.retry_after_s is None]
    first = (lasting or list(faults.values()))[0]
    findings = [Finding(code=fault.reason, adapter=name, fix=fault.message) for name, fault in faults.items()]
    return type(first)(f"{len(faults)} adapters failed: {listed(faults)}", findings)


def _list(
    name: str,
    repository: Repository,
    sources: Sources,
    space: Space,
    progress: Progress,
    listings: ExitStack,
    signed_by: tuple[str, ...],
) -> ListedAdapter:
    progress.enter(name, Stage.FETCHING)
    source, what, taken = sources.of(repository), f"the archive of adapter {name!r}", 0
    take = space.room(what)

    def watch(count: int) -> None:
        space.check(0, what)
        progress.advance(name, count)

    def room(count: int) -> None:
        nonlocal taken
        taken += count
        _check_size(repository, taken)
        take(count)

    with about(repository):
        resolved = source.resolve(repository, watch, room)
    listings.callback(resolved.close)
    sizes = {path: file.size for path, file in resolved.files.items()}
    unsigned = no_signature(sizes) if signed_by else []
    if findings := [*file_findings(sizes), *too_large(sizes), *unsigned]:
        return ListedAdapter(name, source, resolved, (), tuple(findings))
    beside = [
        name for name, is_read in ((README, reads_readme(sizes)), (SIGNATURE, bool(signed_by))) if is_read
    ]
    selected = [*wanted_files(sizes), *beside]
    listed = ListedAdapter(name, source, resolved, tuple(selected), signed_by=signed_by)
    _check_size(repository, listed.size)
    return listed


def _check_size(repository: Repository, size: int) -> None:
    if size > MAX_ADAPTER_BYTES:
        raise SourceRefused(f"{repository.label}: {size} bytes; an adapter has at most {MAX_ADAPTER_BYTES}")


def fetch_adapter(listed: ListedAdapter, folder: Path, progress: Progress) -> FetchedAdapter:
    """Fetch the files of a listed adapter into a folder, or raise what its source does."""
    name, source, resolved = listed.name, listed.source, listed.resolved
    if listed.findings:
        return FetchedAdapter(name, folder, recorded(resolved.repository), {}, listed.findings)
    progress.enter(name, Stage.FETCHING, listed.size)
    with about(resolved.repository):
        files = source.fetch(resolved, listed.selected, folder, progress.counter(name))
    findings = take_signature(folder, files, listed.signed_by)
    if findings:
        return FetchedAdapter(name, folder, recorded(resolved.repository), {}, tuple(findings))
    files.pop(README, None)
    licence = licence_in(folder, resolved.files)
    warnings = tuple(extra_files(resolved.files))
    pinned = recorded(source.pin(resolved, files))
    return FetchedAdapter(
        name, folder, pinned, files, warnings=warnings, listing=listed.digest, licence=licence
    )


def recorded(repository: Repository) -> Repository:
    """Return the origin of an adapter as the generation records it; nothing is fetched from there again."""
    return repository.model_copy(update={"repo": repository.label})


_FIX: Final = "Sign the folder with one of the keys of signed_by: `loramux sign`."


def no_signature(sizes: Mapping[str, int]) -> list[Finding]:
    """Return what is wrong where there is no signature among files that could be one."""
    size = sizes.get(SIGNATURE)
    if size is not None and size <= MAX_SIGNATURE:
        return []
    found = "none" if size is None else f"{size} bytes"
    expected = f"a signature of at most {MAX_SIGNATURE} bytes"
    return [Finding(code="E_SIGNATURE", where=SIGNATURE, expected=expected, found=found, fix=_FIX)]


def take_signature(folder: Path, files: dict[str, FileDigest], signed_by: tuple[str, ...]) -> list[Finding]:
    """Take the signature out of an adapter's files, and return its fault, if signers are required.

    Raises:
        SettingsInvalid: what reads signatures is not installed here.
        SourceUnavailable: Sigstore does not answer.
    """
    signature = files.pop(SIGNATURE, None)
    if signature is None or not signed_by:
        return []
    try:
        found = {name: file.sha256 for name, file in files.items()}
        signatures().require_signed((folder / SIGNATURE).read_bytes(), found, signed_by, SIGNATURE)
    except SignatureInvalid as fault:
        return [Finding(code="E_SIGNATURE", found=fault.message.rstrip("."))]
    finally:
        (folder / SIGNATURE).unlink()
    return []
