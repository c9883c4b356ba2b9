"""Builds a wheel: hatchling's backend, with the operations of CPUs and links that lead somewhere.

The operations are compiled for every kind of processor of this kind of machine. A wheel is pure where nothing
can be compiled: without a C++ compiler, and on other systems than Linux. What it lacks is compiled at the first
start instead. An editable installation compiles nothing either. Metadata are written without a build:
hatchling hides that from pip, which then builds a wheel for its metadata and another one to install.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hatchling.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)
from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.builders.wheel import WheelBuilder
from hatchling.metadata.plugin.interface import MetadataHookInterface

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_wheel",
]
REPOSITORY_URL = "LORAMUX_REPOSITORY_URL"
"""Environment variable: where the sources of this release are, as https://HOST/OWNER/NAME."""
MACHINE = "LORAMUX_WHEEL_MACHINE"
"""Environment variable: the machine that a wheel is for, with CXX as its compiler; else this one."""
LINK = re.compile(r"(!?)\[([^]]*)\]\((?![a-z]+:|#)([^)]+)\)")
PACKAGE = "inference_service/engine/kernels/cpu"


class CompiledOperations(BuildHookInterface[Any]):
    """Compiles into a folder that lives as long as the build."""

    folder: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and tag the wheel for what it holds."""
        if version == "editable" or sys.platform != "linux":
            return
        sys.path.insert(0, self.root)  # in the environment of a build, which is isolated, nothing is installed
        try:
            from inference_service.engine.kernels.cpu import compiling
        finally:
            sys.path.remove(self.root)
        machine = os.environ.get(MACHINE) or platform.machine()
        self.folder = tempfile.TemporaryDirectory(prefix="loramux-build-")
        try:
            into = Path(self.folder.name) / compiling.BEFOREHAND
            made = compiling.compile_beforehand(into, self.app.display_info, machine)
        except subprocess.CalledProcessError as error:
            self._warn(compiling.reason(error))
        except OSError as error:
            self._warn(str(error))
        else:
            inside = f"{PACKAGE}/{compiling.BEFOREHAND}"
            build_data["force_include"] |= {str(path): f"{inside}/{path.name}" for path in made}
            if made:
                build_data |= {"pure_python": False, "tag": f"py3-none-{system_of(made, machine)}"}

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Remove the folder."""
        if self.folder is not None:
            self.folder.cleanup()

    def _warn(self, why: str) -> None:
        self.app.display_warning(
            f"The wheel has no compiled operations ({why}). The inference service compiles them at its first "
            "start, or computes by torch's, more slowly, where it finds no C++ compiler either."
        )


class Links(MetadataHookInterface):
    """Names the repository, and makes the README's links absolute, in a release that states where that is."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the fields that are dynamic."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["urls"] = {}
        if home := os.environ.get(REPOSITORY_URL, "").rstrip("/"):
            page, raw = (f"{home}/{kind}/v{metadata['version']}/" for kind in ("blob", "raw"))
            text = LINK.sub(lambda link: f"{link[1]}[{link[2]}]({raw if link[1] else page}{link[3]})", text)
            metadata["urls"] = {
                "Homepage": home,
                "Documentation": f"{page}docs/index.md",
                "Changelog": f"{page}CHANGELOG.md",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def prepare_metadata_for_build_wheel(
    metadata_directory: str,
    config_settings: dict[str, Any] | None = None,  # noqa: ARG001
) -> str:
    """Write the metadata of a wheel, as hatchling does where pip does not ask: no hook here changes them."""
    builder = WheelBuilder(str(Path.cwd()))
    info = Path(metadata_directory) / f"{builder.artifact_project_id}.dist-info"
    info.mkdir()
    text = builder.config.core_metadata_constructor(builder.metadata)
    (info / "METADATA").write_text(text, encoding="utf-8")
    return info.name


def system_of(libraries: Sequence[Path], machine: str) -> str:
    """Return the tag of systems that can load libraries: any Linux with a glibc as new as what they ask for.

    They also need libstdc++ and libgomp: manylinux promises the first, and torch, without which nothing loads
    them, brings the second. Libraries of another libc have the tag of this kind of machine alone.
    """
    versions = [
        version for path in libraries for version in re.findall(rb"GLIBC_(\d+)\.(\d+)", path.read_bytes())
    ]
    if not versions:
        return f"linux_{machine}"
    major, minor = max((int(major), int(minor)) for major, minor in versions)
    return f"manylinux_{major}_{minor}_{machine}"
