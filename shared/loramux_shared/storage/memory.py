"""A store in memory: the fake beside the real ones."""

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from loramux_shared.storage.base import Entry, ObjectMissing, bound_of, bounded_keys, check_size


class MemoryStore:
    """Objects in a dict; puts are atomic because assignments are."""

    uri = "memory://"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.modified: dict[str, datetime] = {}
        """When the objects were put; one that is not here was put into ``objects`` long ago."""

    def get(self, key: str, bound: int | None = None) -> bytes:
        """Return an object's bytes, or raise `ObjectMissing` or `RecordTooLarge`."""
        data = self.objects.get(key)
        if data is None:
            raise ObjectMissing(f"{self.uri}: no object {key!r}")
        check_size(self.uri, key, len(data), bound_of(key, bound))
        return data

    def put(self, key: str, data: bytes | Path) -> None:
        """Store bytes, or a file's content, under a key."""
        if isinstance(data, bytes):
            check_size(self.uri, key, len(data), bound_of(key))
        self.objects[key] = data.read_bytes() if isinstance(data, Path) else bytes(data)
        self.modified[key] = datetime.now(UTC)

    def take(self, key: str, file: Path) -> None:
        """Store a file's content under a key, and remove the file."""
        self.put(key, file)
        file.unlink()

    def sha256(self, key: str) -> str | None:
        """Return the sha256 of an object in hex, or None when there is none."""
        data = self.objects.get(key)
        return None if data is None else hashlib.sha256(data).hexdigest()

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin with prefix, in lexicographic order."""
        found = (key for key in tuple(self.objects) if key.startswith(prefix))
        yield from sorted(bounded_keys(self.uri, prefix, found))

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yield what `list` yields, with size and age."""
        for key in self.list(prefix):
            data = self.objects.get(key)
            if data is not None:
                yield Entry(key, len(data), self.modified.get(key, datetime.fromtimestamp(0, UTC)))

    def delete(self, key: str) -> None:
        """Remove an object; no error when there is none."""
        self.objects.pop(key, None)
        self.modified.pop(key, None)
