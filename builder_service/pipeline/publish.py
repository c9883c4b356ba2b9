"""Publish: bundles first, each with its manifest last; then the generation; then the pointer to it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from builder_service.pipeline.convert import BuiltBundle
from builder_service.pipeline.progress import Progress, Stage
from shared.bundle.manifest import MANIFEST_FILE, bundle_key
from shared.storage.base import ObjectMissing, Store


def publish_bundle(
    store: Store, bundle: BuiltBundle, names: Sequence[str], served: Collection[str], progress: Progress
) -> None:
    """Put a bundle into the store, unless it is there; its files leave the work folder.

    One that is there, and that the served generation does not refer to, may be an orphan: its manifest is
    put again, for its age is what keeps `loramux gc` from it until a generation does.
    """
    total = sum(file.size for file in bundle.manifest.files.values())
    for name in names:
        progress.enter(name, Stage.PUBLISHING, total)
    reused = _is_there(store, bundle)
    for file, path in bundle.paths.items():
        size, key = bundle.manifest.files[file].size, bundle_key(bundle.digest, file)
        if reused or store.size(key) == size:
            path.unlink()
        else:
            store.take(key, path)
        for name in () if reused else names:
            progress.advance(name, size)
    if not reused or bundle.digest not in served:
        store.put(bundle_key(bundle.digest, MANIFEST_FILE), bundle.manifest_bytes)
    for name in names:
        progress.update(name, stage=Stage.DONE, bytes_done=total, reused=reused)


def _is_there(store: Store, bundle: BuiltBundle) -> bool:
    """True when the manifest is the very same and its files have their sizes; readers verify the digests."""
    try:
        found = store.get(bundle_key(bundle.digest, MANIFEST_FILE))
    except ObjectMissing:
        return False
    return found == bundle.manifest_bytes and all(
        store.size(bundle_key(bundle.digest, name)) == file.size for name, file in bundle.manifest.files.items()
    )
