"""Puts the operations of CPUs into a wheel, compiled for every kind of processor of this kind of machine.

A wheel is pure where nothing can be compiled: without a C++ compiler, and on other systems than Linux. What it
lacks is compiled at the first start instead. An editable installation compiles nothing either.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "inference_service/kernels/cpu"


class CompiledOperations(BuildHookInterface[Any]):
    """Compiles into a folder that lives as long as the build."""

    folder: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and tag the wheel for what it holds."""
        if version == "editable" or sys.platform != "linux":
            return
        sys.path.insert(0, self.root)  # in the environment of a build, which is isolated, nothing is installed
        try:
            from inference_service.kernels.cpu import compiling
        finally:
            sys.path.remove(self.root)
        self.folder = tempfile.TemporaryDirectory(prefix="loramux-build-")
        try:
            made = compiling.compile_beforehand(Path(self.folder.name) / compiling.BEFOREHAND)
        except subprocess.CalledProcessError as error:
            self._warn(compiling.reason(error))
        except OSError as error:
            self._warn(str(error))
        else:
            inside = f"{PACKAGE}/{compiling.BEFOREHAND}"
            build_data["force_include"] |= {str(path): f"{inside}/{path.name}" for path in made}
            if made:
                build_data |= {"pure_python": False, "tag": f"py3-none-{system_of(made)}"}

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Remove the folder."""
        if self.folder is not None:
            self.folder.cleanup()

    def _warn(self, why: str) -> None:
        self.app.display_warning(
            f"The wheel has no compiled operations ({why}). The inference service compiles them at its first "
            "start, or computes by torch's, more slowly, where it finds no C++ compiler either."
        )


def system_of(libraries: Sequence[Path]) -> str:
    """Return the tag of systems that can load libraries: any Linux with a glibc as new as what they ask for.

    They also need libstdc++ and libgomp: manylinux promises the first, and torch, without which nothing loads
    them, brings the second. Libraries of another libc have the tag of this kind of machine alone.
    """
    versions = [
        version for path in libraries for version in re.findall(rb"GLIBC_(\d+)\.(\d+)", path.read_bytes())
    ]
    machine = platform.machine()
    if not versions:
        return f"linux_{machine}"
    major, minor = max((int(major), int(minor)) for major, minor in versions)
    return f"manylinux_{major}_{minor}_{machine}"
