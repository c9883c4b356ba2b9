"""Publish: bundles first, each with its manifest last; then the generation; then the pointer to it."""

from __future__ import annotations

from pathlib import Path

from builder_service.pipeline.convert import BuiltBundle
from builder_service.pipeline.progress import Progress, Stage
from shared.bundle.manifest import MANIFEST_FILE, bundle_key
from shared.storage.base import ObjectMissing, Store


def publish_bundle(store: Store, bundle: BuiltBundle, progress: Progress) -> None:
    """Put a bundle into the store, unless it is there."""
    files = bundle.paths
    progress.enter(bundle.name, Stage.PUBLISHING, sum(file.size for file in bundle.manifest.files.values()))
    reused = _is_there(store, bundle)
    if not reused:
        for name, path in files.items():
            _put(store, bundle, name, path, progress)
        store.put(bundle_key(bundle.digest, MANIFEST_FILE), bundle.manifest.to_bytes())
    for path in files.values():
        path.unlink()
    total = sum(file.size for file in bundle.manifest.files.values())
    progress.update(bundle.name, stage=Stage.DONE, bytes_done=total, reused=reused)


def _put(store: Store, bundle: BuiltBundle, name: str, path: Path, progress: Progress) -> None:
    size = bundle.manifest.files[name].size
    if store.size(bundle_key(bundle.digest, name)) != size:
        store.put(bundle_key(bundle.digest, name), path)
    progress.advance(bundle.name, size)


def _is_there(store: Store, bundle: BuiltBundle) -> bool:
    """True when the manifest is the very same and its files have their sizes; readers verify the digests."""
    try:
        found = store.get(bundle_key(bundle.digest, MANIFEST_FILE))
    except ObjectMissing:
        return False
    return found == bundle.manifest.to_bytes() and all(
        store.size(bundle_key(bundle.digest, name)) == file.size for name, file in bundle.manifest.files.items()
    )
