"""Archives, well-meant and hostile."""

import gzip
import io
import tarfile
from collections.abc import Iterable


def pack(files: dict[str, bytes]) -> bytes:
    return pack_members((member(name, len(data)), data) for name, data in files.items())


def member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, target
    return info


def pack_members(members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zeros(size: int) -> bytes:
    """Return a gzip stream of so many zero bytes."""
    buffer = io.BytesIO()
    with gzip.open(buffer, "wb", compresslevel=9) as packed:
        for _ in range(size >> 20):
            packed.write(bytes(1 << 20))
    return buffer.getvalue()
