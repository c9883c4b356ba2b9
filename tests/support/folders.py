"""Deployments of adapters in folders, and their builds, without a builder service."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder_service.pipeline.build import build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress
from loramux_shared.bundle.generation import Generation
from loramux_shared.bundle.reader import Bundle, read_bundle
from loramux_shared.deployment import Deployment, Repository
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.faults import Finding
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.base import Store
from loramux_shared.storage.memory import MemoryStore


def local_source(folder: Path) -> dict[str, str]:
    return {"source": "LOCAL", "repo": str(folder)}


def local_repository(folder: Path) -> Repository:
    return Repository.model_validate(local_source(folder))


def deployment_of(folder: Path, *names: str, name: str = "tiny", **build: Any) -> Deployment:
    """The adapters with these names below a folder on the base there; further fields are those of ``build``."""
    made = {
        "checkpoint_repository": local_source(folder / "base"),
        "lora_adapters": {each: local_source(folder / each) for each in names},
    }
    return parse_deployment({"model_name": name, "build": made | build}).deployment


def context_of(folder: Path, store: Store | None = None, **fields: Any) -> BuildContext:
    """Return the context of a builder for a folder; the default is a new store."""
    sources = open_sources(local_roots=[folder])
    return BuildContext(store or MemoryStore(), sources, folder / "work", **fields)


@dataclass(frozen=True)
class BuildResult:
    """The result of a build."""

    generation: Generation
    progress: Progress
    store: Store
    unchanged: bool

    def bundle(self, name: str = "one") -> Bundle:
        """Read an adapter as a replica does."""
        return read_bundle(self.store, self.generation.adapters[name].digest)

    def warnings(self, name: str = "one") -> tuple[Finding, ...]:
        return next(each.warnings for each in self.progress.adapters if each.name == name)


def run_build(required: Deployment, context: BuildContext, *, verify: bool = False) -> BuildResult:
    """Build a deployment; raises the build's fault."""
    progress = Progress(required.build.lora_adapters)
    result = build(required, context, progress, verify=verify)
    return BuildResult(result.generation, progress, context.store, result.unchanged)
