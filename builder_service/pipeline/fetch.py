"""Fetch: adapter repositories at their revisions, into the work folder."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from builder_service.domain.file_rules import extra_files, file_findings, wanted_files
from builder_service.domain.text_rules import too_large
from builder_service.pipeline.progress import Progress, Stage
from shared.bundle.manifest import FileDigest
from shared.deployment import Repository
from shared.faults import BuildInterrupted, Fault, Finding, SourceRefused
from shared.sources.open import Sources

PARALLEL: Final = 4
"""Adapters that are fetched at once."""
MAX_BYTES: Final = 8 << 30
"""Of one adapter; a rank-64 adapter of a 70B base has about 1.6e9."""


@dataclass(frozen=True)
class FetchedAdapter:
    """An adapter's files in the work folder, or why there are none."""

    name: str
    folder: Path
    source: Repository
    """With the final revision where the files were fetched, and without the query of a signed address."""
    files: Mapping[str, FileDigest]
    findings: tuple[Finding, ...] = ()
    warnings: tuple[Finding, ...] = ()
    """About files that are there and not used."""


def fetch_adapters(
    adapters: Mapping[str, Repository], sources: Sources, work: Path, progress: Progress
) -> list[FetchedAdapter]:
    """Fetch every adapter, several at once; in the order of their names.

    Raises:
        Fault: what sources raise, of all adapters: see `joined`.
    """
    names = sorted(adapters)
    with ThreadPoolExecutor(PARALLEL, "fetch") as pool:
        futures = [
            pool.submit(_fetch, name, adapters[name], sources, work / f"adapter-{i}", progress)
            for i, name in enumerate(names)
        ]
    faults = {}
    for name, future in zip(names, futures, strict=True):
        error = future.exception()
        if isinstance(error, Fault) and not isinstance(error, BuildInterrupted):
            faults[name] = error
            progress.update(name, stage=Stage.REFUSED)
        elif error is not None:
            raise error
    if faults:
        raise joined(faults)
    return [future.result() for future in futures]


def joined(faults: Mapping[str, Fault]) -> Fault:
    """Return the faults of adapters as one.

    Of several there is one finding each, whose code is the reason. The reason of the whole is the first of
    those that trying again does not cure, so that nobody tries again in vain.
    """
    if len(faults) == 1:
        [(name, fault)] = faults.items()
        return type(fault)(f"adapter {name!r}: {fault.message}", fault.findings)
    lasting = [fault for fault in faults.values() if fault.retry_after_s is None]
    first = (lasting or list(faults.values()))[0]
    findings = [Finding(code=fault.reason, adapter=name, fix=fault.message) for name, fault in faults.items()]
    return type(first)(f"the sources of {len(faults)} adapters failed: {', '.join(faults)}", findings)


def _fetch(
    name: str, repository: Repository, sources: Sources, folder: Path, progress: Progress
) -> FetchedAdapter:
    progress.enter(name, Stage.FETCHING)
    source = sources.of(repository)
    resolved = source.resolve(repository, progress.counter(name), max_bytes=MAX_BYTES)
    sizes = {path: file.size for path, file in resolved.files.items()}
    findings = [*file_findings(sizes), *too_large(sizes)]
    if findings:
        return FetchedAdapter(name, folder, _recorded(resolved.repository), {}, tuple(findings))
    names = wanted_files(sizes)
    total = resolved.size(names)
    if total > MAX_BYTES:
        raise SourceRefused(f"{repository.shown}: {total} bytes; an adapter has at most {MAX_BYTES}")
    progress.enter(name, Stage.FETCHING, total)
    files = source.fetch(resolved, names, folder, progress.counter(name))
    warnings = tuple(extra_files(resolved.files))
    return FetchedAdapter(name, folder, _recorded(source.pin(resolved, files)), files, warnings=warnings)


def _recorded(repository: Repository) -> Repository:
    """Return what the generation says about an adapter's origin: nobody fetches it again from there."""
    return repository.model_copy(update={"repo": repository.shown})
