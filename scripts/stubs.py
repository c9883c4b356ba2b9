"""Generate the gRPC stubs from protos/; with --check, compare.

Stubs demand a grpcio and a protobuf as new as the compiler that wrote them. This is the oldest whose output
works with protobuf 6 and 7; it is installed without its dependencies, whose protobuf would be older than ours.
For Python 3.14 and newer there is no wheel of it, and nothing is done.
"""

from __future__ import annotations

import importlib.resources
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def generate(target: Path) -> list[Path]:
    """Write the stubs below target, where they lie below the root, and return their paths relative to it."""
    from grpc_tools import protoc

    folder = ROOT / "protos"
    include = importlib.resources.files("grpc_tools") / "_proto"
    args = [f"-I{folder}", f"-I{include}"]
    args += [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", *args, *map(str, sorted(folder.rglob("*.proto")))]):
        raise SystemExit("protoc failed")
    for pyi in target.rglob("*_pb2.pyi"):  # grpcio-tools leaves trailing blanks in some releases
        pyi.write_text("\n".join(line.rstrip() for line in pyi.read_text().splitlines()) + "\n")
    return sorted(path.relative_to(target) for path in target.rglob("*_pb2*.py*"))


def main() -> None:
    """Regenerate, or compare."""
    if sys.version_info >= (3, 14):
        return
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        stale = [path for path in generate(fresh) if not _same(fresh / path, ROOT / path)]
        if "--check" not in sys.argv:
            for path in stale:
                shutil.copyfile(fresh / path, ROOT / path)
        elif stale:
            raise SystemExit(
                f"generated stubs are out of date: {', '.join(map(str, stale))}. Run `make stubs`."
            )


def _same(fresh: Path, committed: Path) -> bool:
    return committed.exists() and fresh.read_bytes() == committed.read_bytes()


if __name__ == "__main__":
    main()
