"""Fetch: adapter repositories at their revisions, into the work folder."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from builder_service.domain.file_rules import INPUTS, file_findings
from builder_service.pipeline.progress import Progress, Stage
from shared.bundle.manifest import FileDigest
from shared.deployment import Repository
from shared.faults import Fault, Finding, SourceRefused
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
    """With the final revision where the files were fetched."""
    files: Mapping[str, FileDigest]
    findings: tuple[Finding, ...] = ()


def fetch_adapters(
    adapters: Mapping[str, Repository], sources: Sources, work: Path, progress: Progress
) -> list[FetchedAdapter]:
    """Fetch every adapter, several at once; in the order of their names.

    Raises:
        Fault: what a source raises, with the adapter's name; of several, the first by name.
    """
    names = sorted(adapters)
    with ThreadPoolExecutor(PARALLEL, "fetch") as pool:
        futures = [
            pool.submit(_fetch, name, adapters[name], sources, work / f"adapter-{i}", progress)
            for i, name in enumerate(names)
        ]
        return [future.result() for future in futures]


def _fetch(
    name: str, repository: Repository, sources: Sources, folder: Path, progress: Progress
) -> FetchedAdapter:
    progress.enter(name, Stage.FETCHING)
    try:
        source = sources.of(repository)
        resolved = source.resolve(repository)
        findings = file_findings(resolved.files)
        if findings:
            return FetchedAdapter(name, folder, resolved.repository, {}, tuple(findings))
        total = resolved.size(INPUTS)
        if total > MAX_BYTES:
            raise SourceRefused(f"{repository.repo}: {total} bytes; an adapter has at most {MAX_BYTES}")
        progress.enter(name, Stage.FETCHING, total)
        files = source.fetch(resolved, INPUTS, folder, progress.counter(name))
        return FetchedAdapter(name, folder, source.pin(resolved, files), files)
    except Fault as fault:
        raise type(fault)(f"adapter {name!r}: {fault.message}", fault.findings) from fault
