"""Megabytes and seconds of an installation: a client, the command line, `loramux check` and a builder.

    python -m benchmarks.install

Each round installs a wheel of this tree, or that of --wheel, with pip into an empty environment; downloads come
from pip's cache but for the first round. Megabytes are those of all files, bytecode included, without pip. What
runs was run once before it is measured.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from benchmarks.figures import Figure, machine

ROOT: Final = Path(__file__).resolve().parent.parent
BASE: Final = Path("~/.cache/loramux/models/SmolLM2-135M-Instruct").expanduser()
"""The base that `make demo` installs."""
EXTRAS: Final = ("", "cli", "check", "builder")
WITH_CHECK: Final = ("check", "builder")
RUNS: Final = 3
"""Runs of each command; the fastest counts, as another process can only make it slower."""
IMPORT_BAR_S: Final = 0.3
HELP_BAR_S: Final = 0.4


def run(command: Sequence[str | Path], folder: Path) -> float:
    """Run a command in a folder, without what this process was started with; return its seconds."""
    hidden = ("PYTHON", "LORAMUX_", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True)  # noqa: S603 - ours
    return time.perf_counter() - began


def wheel_in(folder: Path) -> Path:
    """Build a wheel of this tree."""
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT], folder)
    [wheel] = folder.glob("*.whl")
    return wheel


def install(wheel: Path, extra: str, environment: Path) -> float:
    """Install into a new environment, and return the seconds of it."""
    venv.create(environment, with_pip=False)
    requirement = f"{wheel}[{extra}]" if extra else str(wheel)
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "install", "--quiet"]
    return run([*pip, requirement], environment)


def megabytes(environment: Path) -> float:
    """Return what the packages of an environment occupy."""
    files = (path.lstat() for path in (environment / "lib").rglob("*"))
    return sum(each.st_blocks * 512 for each in files) / 1e6


def commands_of(extra: str, environment: Path, base: Path) -> Iterator[tuple[str, list[str | Path]]]:
    """Yield the name of each command that an extra is for, and the command."""
    loramux = environment / "bin/loramux"
    yield "from loramux import Client", [environment / "bin/python", "-c", "from loramux import Client"]
    if extra:
        yield "loramux --help", [loramux, "--help"]
    if extra in WITH_CHECK:
        for adapter in sorted((ROOT / "examples/adapters").iterdir()):
            yield f"loramux check {adapter.name}", [loramux, "check", adapter, "--base", base]


def measure(wheel: Path, extra: str, base: Path) -> Iterator[tuple[str, str, float]]:
    """Yield name, unit and value of all that is measured of an environment of its own."""
    with tempfile.TemporaryDirectory(prefix="loramux-install-") as folder:
        environment = Path(folder) / "venv"
        yield "install", "s", install(wheel, extra, environment)
        yield "disk", "MB", megabytes(environment)
        for name, command in commands_of(extra, environment, base):
            run(command, environment)
            yield name, "s", min(run(command, environment) for _ in range(RUNS))


def main() -> None:
    """Measure, and print a figure for each; exit status 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wheel", type=Path, help="default: one of this tree, which takes minutes to build")
    parser.add_argument("--base", type=Path, default=BASE)
    options = parser.parse_args()
    found: dict[tuple[str, str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="loramux-wheel-") as folder:
        wheel = options.wheel.resolve() if options.wheel else wheel_in(Path(folder))
        for _ in range(options.rounds):
            for extra in EXTRAS:
                for name, unit, value in measure(wheel, extra, options.base):
                    found.setdefault((extra, name, unit), []).append(value)
    print(machine())
    bars = {"from loramux import Client": IMPORT_BAR_S, "loramux --help": HELP_BAR_S}
    figures = [
        Figure(
            f"{f'loramux[{extra}]' if extra else 'loramux'}: {name}",
            statistics.median(values),
            unit,
            bars.get(name),
        )
        for (extra, name, unit), values in found.items()
    ]
    print(*figures, sep="\n")
    sys.exit(not all(each.met for each in figures))


if __name__ == "__main__":
    main()
