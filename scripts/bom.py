"""Bills of materials of a release, in CycloneDX's JSON: what a wheel declares, and what an extra resolves to.

The same wheel gives the same bytes: nothing is drawn, no time is written, and an index counts as it was at a
stated time.
"""

import json
import subprocess
import sys
import uuid
import zipfile
from collections import defaultdict
from email import message_from_bytes
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.version import Version

VERSION: Final = SchemaVersion.V1_7
"""The first one with ranges of versions."""


def declare(wheel: Path) -> str:
    """Return the bill of a wheel: its compiled operations, and the packages that it declares with ranges."""
    with zipfile.ZipFile(wheel) as archive:
        [place] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_bytes(archive.read(place))
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
        files = [
            {"type": "file", "name": name, **_hashes(sha256(archive.read(name)).hexdigest())}
            for name in sorted(libraries)
        ]
    extras = defaultdict[tuple[str, str], set[str]](set)
    for line in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(line)
        _, _, extra = str(requirement.marker or "").partition("extra == ")
        extras[requirement.name, _range(requirement)].add(extra.strip('"'))
    packages = [_package(name, versions, extras[name, versions]) for name, versions in sorted(extras)]
    content = sha256(wheel.read_bytes()).hexdigest()
    root = f"pkg:pypi/{metadata['Name']}@{metadata['Version']}?file_name={wheel.name}"
    bill = {
        "$schema": f"http://cyclonedx.org/schema/bom-{VERSION.to_version()}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": VERSION.to_version(),
        "serialNumber": uuid.uuid5(uuid.NAMESPACE_URL, f"{root}#{content}").urn,
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": root,
                "name": metadata["Name"],
                "version": metadata["Version"],
                "purl": root,
                "licenses": [{"license": {"id": metadata["License-Expression"]}}],
                **_hashes(content),
                "components": files,
            },
        },
        "components": packages,
        "dependencies": [{"ref": root, "dependsOn": [package["bom-ref"] for package in packages]}],
    }
    text = json.dumps(bill, indent=2) + "\n"
    if error := JsonStrictValidator(VERSION).validate_str(text):
        sys.exit(f"release: the bill of {wheel.name} is none of CycloneDX {VERSION.to_version()}: {error}")
    return text


def _hashes(digest: str) -> dict[str, Any]:
    return {"hashes": [{"alg": "SHA-256", "content": digest}]}


def _range(requirement: Requirement) -> str:
    """Return the versions that a requirement allows, as a `vers` of PyPI."""
    bounds = sorted(requirement.specifier, key=lambda each: Version(each.version))
    return "vers:pypi/" + ("|".join(f"{each.operator}{each.version}" for each in bounds) or "*")


def _package(name: str, versions: str, extras: set[str]) -> dict[str, Any]:
    """Return the component of a package that only some extras need, or, with "", the wheel alone."""
    return {
        "type": "library",
        "bom-ref": f"{name} {versions}",
        "name": name,
        "versionRange": versions,
        "isExternal": True,
        "scope": "required" if "" in extras else "optional",
        "purl": f"pkg:pypi/{name}",
        "properties": [{"name": "loramux:extra", "value": extra} for extra in sorted(extras - {""})],
    }


def resolve(wheel: Path, extra: str, before: str) -> str:
    """Return the bill of an extra: what pip would install here of what an index had before a time."""
    pip = (
        "install",
        "--dry-run",
        "--ignore-installed",
        "--quiet",
        "--report",
        "-",
        "--uploaded-prior-to",
        before,
    )
    return bill_of(json.loads(_run("", "pip", *pip, f"{wheel}[{extra}]")))


def bill_of(report: dict[str, Any]) -> str:
    """Return the bill of what a report of pip would install beside the wheel itself."""
    pinned = sorted(
        f"{item['metadata']['name']}=={item['metadata']['version']} "
        f"--hash=sha256:{item['download_info']['archive_info']['hashes']['sha256']}"
        for item in report["install"]
        if not item["is_direct"]
    )
    project = Path(__file__).parents[1] / "pyproject.toml"
    options = ("--pyproject", str(project), "--mc-type", "library", "--output-reproducible")
    return _run("\n".join(pinned), "cyclonedx_py", "requirements", *options, "-")


def _run(text: str, module: str, *arguments: str) -> str:
    """Run a module on a text, and return what it printed; end the release where it fails."""
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)  # noqa: S603 - ours
    if done.returncode:
        sys.exit(f"release: {module} {arguments[0]} failed:\n{done.stderr[-4000:]}")
    return done.stdout
