"""A bucket in memory."""

from collections.abc import Iterator

from loramux_shared.faults import SourceUnavailable
from loramux_shared.sources.base import SourceFile


class FakeBucket:
    """A bucket in memory whose reads fail as often as wanted."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.reads = 0
        self.failures: list[SourceUnavailable] = []

    def list(self, prefix: str) -> Iterator[tuple[str, SourceFile]]:
        if self.failures:
            raise self.failures.pop()
        for name, data in self.files.items():
            yield prefix + name, SourceFile(len(data), version="1")

    def read(self, key: str, version: str) -> Iterator[bytes]:
        """Yield a file in two pieces, the second of which may fail."""
        assert version == "1"
        self.reads += 1
        data = self.files[key.rpartition("one/")[2]]
        yield data[:2]
        if self.failures:
            raise self.failures.pop()
        yield data[2:]

    def close(self) -> None:
        """Nothing is open."""
