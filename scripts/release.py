"""``make release``: the sdist, wheels, and bills of materials, built twice, checked, with their digests.

Nothing is published. A wheel is refused that differs between two builds, or that asks more of a system than
manylinux_2_28 promises. libgomp is no part of that: torch brings it, without which nothing loads operations.
"""

import hashlib
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path
from typing import Final

from auditwheel.architecture import Architecture
from auditwheel.libc import Libc
from auditwheel.wheel_abi import analyze_wheel_abi

from scripts import bom

ROOT: Final = Path(__file__).parents[1]
OUT: Final = ROOT / "build/release"
MACHINES: Final = ("x86_64", "aarch64")
SERVICES: Final = ("builder", "inference")
"""Extras with a bill of what they resolve to."""
MAX_GLIBC: Final = (2, 28)
PROVIDED: Final = frozenset({"libgomp.so.1"})


def build(source: Path, out: Path, kind: str, **environment: str) -> Path:
    """Build an sdist or a wheel of a folder in an environment of its own; return it."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--outdir", str(out), str(source)]
    known = set(out.iterdir())
    done = subprocess.run(  # noqa: S603 - ours
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        sys.exit(f"release: cannot build the {kind}:\n{done.stdout.decode(errors='replace')[-4000:]}")
    [made] = set(out.iterdir()) - known
    return made


def build_all(out: Path) -> list[Path]:
    """Build the sdist, and from what it holds a wheel for each kind of machine."""
    out.mkdir(parents=True, exist_ok=True)
    made = [build(ROOT, out, "sdist")]
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(made[0]) as archive:
            archive.extractall(folder, filter="data")
        [source] = Path(folder).iterdir()
        for machine in MACHINES:
            cross = {} if machine == platform.machine() else {"CXX": f"{machine}-linux-gnu-g++"}
            made.append(build(source, out, "wheel", LORAMUX_WHEEL_MACHINE=machine, **cross))
    return made


def check_wheel(wheel: Path) -> None:
    """End the release where a wheel's libraries ask for newer systems than its tag, or than MAX_GLIBC."""
    tag = wheel.stem.rpartition("-")[2]
    machine = next((machine for machine in MACHINES if tag.endswith(machine)), None)
    if machine is None:
        sys.exit(
            f"release: {wheel.name} has no compiled operations: install {MACHINES[1]}-linux-gnu-g++ and g++"
        )
    found = analyze_wheel_abi(
        Libc.GLIBC,
        Architecture(machine),
        wheel,
        PROVIDED,
        disable_isa_ext_check=True,  # a start chooses among kinds of processor
        allow_graft=False,
    )
    _, major, minor, *_ = found.overall_policy.name.split("_")
    if found.overall_policy.name != tag or (int(major), int(minor)) > MAX_GLIBC:
        sys.exit(f"release: {wheel.name} needs {found.overall_policy.name}: {dict(found.versioned_symbols)}")


def write_bills(made: list[Path], before: str) -> list[Path]:
    """Write bills of materials beside wheels: of each, and of each service's extra on this machine."""
    texts = {wheel.stem: bom.declare(wheel) for wheel in made[1:]}
    here = next(wheel for wheel in made if wheel.stem.endswith(platform.machine()))
    version = "-".join(here.name.split("-")[:2])
    texts |= {f"{version}-{extra}": bom.resolve(here, extra, before) for extra in SERVICES}
    bills = [here.with_name(f"{name}.cdx.json") for name in texts]
    for bill, text in zip(bills, texts.values(), strict=True):
        bill.write_text(text)
    return bills


def digest(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Build, check and write SHA256SUMS."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name, expected in (("CHANGELOG.md", f"## {version}"), ("CITATION.cff", f"version: {version}")):
        if expected not in (ROOT / name).read_text():
            sys.exit(f"release: {name} does not have {expected!r}")
    if OUT.exists() and any(OUT.iterdir()):
        sys.exit(f"release: {OUT} is not empty; remove it")
    committed = ("git", "log", "-1", "--format=%cI")
    before = subprocess.run(committed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603 - ours
    made = build_all(OUT)
    for wheel in made[1:]:
        check_wheel(wheel)
    bills = write_bills(made, before)
    with tempfile.TemporaryDirectory() as folder:
        again = build_all(Path(folder))
        for first, second in zip(made + bills, again + write_bills(again, before), strict=True):
            if digest(first) != digest(second):
                sys.exit(f"release: two builds of {first.name} differ")
    lines = [f"{digest(path)}  {path.name}" for path in made + bills]
    (OUT / "SHA256SUMS").write_text("".join(f"{line}\n" for line in lines))
    print(*lines, f"in {OUT}; the tag is v{version}", sep="\n")  # noqa: T201


if __name__ == "__main__":
    main()
