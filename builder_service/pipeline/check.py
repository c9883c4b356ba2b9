"""Check: everything that a build would find in one adapter; nothing is written to the store."""

import asyncio
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Final

from builder_service.domain.origin import origin_warnings
from builder_service.domain.rules.checked import CheckedAdapter
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.convert import bundle_bytes
from builder_service.pipeline.fetch import fetch_adapters
from builder_service.pipeline.making import open_workshop
from builder_service.pipeline.progress import Progress
from builder_service.pipeline.validate import check_deployment, check_fetched, rulebook
from loramux_shared.access.keys import ACCESS
from loramux_shared.access.shares import Shares
from loramux_shared.bases.memory import ITEM_BYTES, widening
from loramux_shared.bundle.manifest import FileDigest, ModuleRow, ScoreHead, npy_files
from loramux_shared.bundle.npy import DESCR, header_bytes
from loramux_shared.codes import CODES
from loramux_shared.deployment import Deployment, Dtype, Repository
from loramux_shared.faults import (
    BuildInterrupted,
    BuildTimedOut,
    Fault,
    Finding,
    ResourcesExhausted,
    ShuttingDown,
    SourceUnavailable,
)
from loramux_shared.sources.checkpoint import Base

ADAPTER: Final = "adapter"
"""The name of the one adapter of a check."""
PREFIX: Final = f"adapter {ADAPTER!r}: "
"""Begins messages about the one adapter, which its caller need not be told."""
MAX_COMPUTING_CHECKS: Final = 2
"""Checks that compute at once; others wait."""
MAX_OPEN_CHECKS: Final = 16
"""Checks that fetch or compute at once: most wait for sources, which costs no processor."""
MAX_CHECK_S: Final = 600.0
"""Seconds of a check: what takes longer to fetch is built."""
TOO_SLOW: Final = f"the check took longer than {MAX_CHECK_S:g} s. Use a nearer copy, or build the adapter."


@dataclass(frozen=True)
class CheckedReport:
    """The result of an adapter's check."""

    adapter: Repository
    """Repository with the resolved revision, where the files were fetched."""
    base: Repository
    dtype: Dtype
    findings: tuple[Finding, ...]
    """Errors first."""
    files: Mapping[str, FileDigest]
    rows: tuple[ModuleRow, ...] = ()
    bundle_bytes: int = 0
    base_model_name: str = ""
    licence: str = ""
    base_licence: str = ""
    kinds: tuple[str, ...] = ()
    replaced_rows: Mapping[str, int] = field(default_factory=dict)
    invocation_tokens: tuple[int, ...] = ()
    score: ScoreHead | None = None
    """Score head of a classifier."""

    @property
    def accepted(self) -> bool:
        """Return True if a build would accept the adapter."""
        return all(finding.code.startswith("W_") for finding in self.findings)


def check_one(
    deployment: Deployment,
    context: BuildContext,
    progress: Progress,
    computing: AbstractContextManager[object] | None = None,
) -> CheckedReport:
    """Check the adapter of a deployment that has one; computing is held while it computes. Blocks.

    Raises:
        Fault: what the base or a source raises; rules that are broken are findings.
    """
    with open_workshop(context, context.store, progress) as workshop:
        build, sources = deployment.build, context.sources
        base = workshop.describe(build.checkpoint_repository, max_seq_len=build.max_seq_len)
        rules = rulebook(base.model, build.lora_configuration, workshop.weights(base.record))
        adapters, signers = build.lora_adapters, build.signed_by
        [fetched] = fetch_adapters(adapters, sources, workshop.space, workshop.work, progress, signers)
        with computing or nullcontext():
            checked = check_fetched(fetched, rules, progress)
        rows = tuple(planned.row for planned in checked.rows)
        changes = bool(rows or checked.replaced)
        named = origin_warnings(checked.base_model_name, fetched.licence, base.record) if changes else []
        found = [*checked.findings, *named, *fetched.warnings]
        found += _widened(base)
        found.sort(key=lambda finding: finding.code.startswith("W_"))
        return CheckedReport(
            fetched.source,
            base.record.source,
            rules.dtype,
            tuple(found),
            fetched.files,
            rows,
            _files_bytes(checked, rules.dtype),
            checked.base_model_name,
            fetched.licence,
            base.record.licence,
            checked.kinds,
            {planned.replaced.module: planned.replaced.count for planned in checked.replaced},
            checked.invocation_tokens,
            checked.score.head if checked.score else None,
        )


def _widened(base: Base) -> list[Finding]:
    """Return what replicas will need for a base of few bits."""
    if base.model.quantization is not None and base.model.quantization.in_blocks:
        return []  # a CPU keeps them
    dtype = base.model.dtype if base.model.dtype in ITEM_BYTES else "bfloat16"
    formats = widening(base.model, base.record.weights_bytes, dtype)
    return (
        [Finding(code="W_WIDENED", where="base", found=formats, fix=CODES["W_WIDENED"].cure)] if formats else []
    )


def _files_bytes(checked: CheckedAdapter, dtype: Dtype) -> int:
    heads = len(npy_files(checked.modules, score=checked.score is not None)) * len(
        header_bytes(DESCR[dtype], (1, 1, 1))
    )
    return bundle_bytes(checked, dtype) + heads


class Checks:
    """Checks as a service: in threads, a bounded number at once, for a bounded time, stopped when the caller is
    gone.
    """

    def __init__(self, context: BuildContext) -> None:
        self._context = context
        self._pool = ThreadPoolExecutor(MAX_OPEN_CHECKS, "check")
        self._places = Shares(MAX_OPEN_CHECKS)
        self._computing = threading.Semaphore(MAX_COMPUTING_CHECKS)
        self._running: set[Progress] = set()
        self._stopped = False

    async def check(self, deployment: Deployment) -> CheckedReport:
        """Check the adapter of a deployment that has one.

        Raises:
            DeploymentInvalid, ResourcesExhausted, ShuttingDown
            CheckpointInvalid: the base is not served.
            RepoNotFound, RevisionNotFound, RepoGated, SourceRefused, SourceChanged, SourceUnavailable,
            BundleCorrupt: what a source raises.
        """
        check_deployment(deployment)
        async with self._places.awaited(ACCESS.get().key_id, "checks"):
            return await self._check(deployment)

    async def _check(self, deployment: Deployment) -> CheckedReport:
        if self._stopped:
            raise ShuttingDown("the builder is shutting down. Retry with its successor.")
        progress = Progress(deployment.build.lora_adapters)
        self._running.add(progress)
        loop = asyncio.get_running_loop()
        late = loop.call_later(MAX_CHECK_S, progress.stop, BuildTimedOut(TOO_SLOW))
        try:
            return await loop.run_in_executor(
                self._pool, check_one, deployment, self._context, progress, self._computing
            )
        except BuildTimedOut as fault:
            raise SourceUnavailable(fault.message) from fault
        except BuildInterrupted as fault:
            raise ShuttingDown("the builder stopped during the check. Retry with its successor.") from fault
        except Fault as fault:
            raise fault.with_message(fault.message.removeprefix(PREFIX)) from fault
        except OSError as error:
            problem = error.strerror or type(error).__name__
            raise ResourcesExhausted(f"the builder's work folder: {problem}. Free some space.") from error
        finally:
            late.cancel()
            progress.stop()
            self._running.discard(progress)

    def stop(self) -> None:
        """Take no new checks, and end those that run."""
        self._stopped = True
        for progress in self._running:
            progress.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
