"""Bills of materials: valid, the same for the same wheel, with declared ranges and resolved digests."""

import json
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("cyclonedx", reason="cyclonedx-bom is not installed")

from scripts import bom

METADATA = """\
Metadata-Version: 2.4
Name: loramux
Version: 0.1.0
License-Expression: {license}
Requires-Dist: grpcio>=1.72.1
Requires-Dist: protobuf<8,>=6.30
Requires-Dist: numpy>=2.0; extra == 'builder'
Requires-Dist: numpy>=2.0; extra == 'store'
"""


def wheel(folder: Path, licence: str = "Apache-2.0") -> Path:
    path = folder / "loramux-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("loramux-0.1.0.dist-info/METADATA"), METADATA.format(license=licence))
        archive.writestr(zipfile.ZipInfo("inference_service/ops.so"), b"code")
    return path


def test_a_wheel_declares_ranges(tmp_path: Path) -> None:
    """The bill has the wheel and its libraries, and each package once, with its range and extras."""
    bill = json.loads(bom.declare(wheel(tmp_path)))
    root = bill["metadata"]["component"]
    assert root["purl"] == "pkg:pypi/loramux@0.1.0?file_name=loramux-0.1.0-py3-none-any.whl"
    assert [each["name"] for each in root["components"]] == ["inference_service/ops.so"]
    packages = {
        each["name"]: (each["versionRange"], each["scope"], [extra["value"] for extra in each["properties"]])
        for each in bill["components"]
    }
    assert packages == {
        "grpcio": ("vers:pypi/>=1.72.1", "required", []),
        "protobuf": ("vers:pypi/>=6.30|<8", "required", []),
        "numpy": ("vers:pypi/>=2.0", "optional", ["builder", "store"]),
    }
    [dependencies] = bill["dependencies"]
    assert len(dependencies["dependsOn"]) == 3


def test_a_bill_is_the_same_for_the_same_wheel(tmp_path: Path) -> None:
    """Two bills of a wheel are the same bytes, and another wheel's has another serial number."""
    (tmp_path / "again").mkdir()
    first, again, other = (
        bom.declare(wheel(tmp_path)),
        bom.declare(wheel(tmp_path / "again")),
        bom.declare(wheel(tmp_path, "MIT")),
    )
    assert first == again
    assert json.loads(first)["serialNumber"] != json.loads(other)["serialNumber"]


def test_an_invalid_bill_is_refused(tmp_path: Path) -> None:
    """A licence that CycloneDX does not know ends the release."""
    with pytest.raises(SystemExit, match=r"the bill of loramux-0\.1\.0\S* is none of CycloneDX 1\.7"):
        bom.declare(wheel(tmp_path, "Some License"))


def test_an_extra_is_what_pip_resolved() -> None:
    """The bill has each package with its version and digest in one order, and no time, whatever pip's order."""

    def item(name: str, version: str, direct: bool = False) -> dict[str, object]:
        archive = {"archive_info": {"hashes": {"sha256": name[0] * 64}}}
        return {"metadata": {"name": name, "version": version}, "is_direct": direct, "download_info": archive}

    items = [item("loramux", "0.1.0", True), item("boto3", "1.44.8"), item("attrs", "26.1.0")]
    text = bom.bill_of({"install": items})
    assert text == bom.bill_of({"install": items[::-1]})
    bill = json.loads(text)
    assert [each["purl"] for each in bill["components"]] == ["pkg:pypi/attrs@26.1.0", "pkg:pypi/boto3@1.44.8"]
    [reference] = bill["components"][0]["externalReferences"]
    assert reference["hashes"] == [{"alg": "SHA-256", "content": "a" * 64}]
    assert bill["metadata"]["component"]["name"] == "loramux"
    assert "serialNumber" not in bill
    assert "timestamp" not in bill["metadata"]
