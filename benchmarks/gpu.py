"""Everything that one GPU can tell, in one command: is it right, and how fast is it.

Correctness comes first and stops the run when it is red. Then, each against its floor or its peer: SGMV, paged
attention, a decode step of an 8B-shaped random model, and serving over gRPC. No network; the time of sections
is bounded, to 8 minutes together. A table is printed last, and says for every target whether it is met; rows
are printed on standard error as they come.

    python -m benchmarks.gpu --json gpu.json
    python -m benchmarks.gpu --only sgmv --only step --quick
    python -m benchmarks.gpu --only tune
    python -m benchmarks.gpu --dry
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from benchmarks.on_gpu import attention, correctness, delta, machine, serving, sgmv, step, tune
from benchmarks.on_gpu.device import Device, Gpu, Machine, Rehearsal
from benchmarks.on_gpu.report import Report
from benchmarks.on_gpu.run import Run, Scale
from benchmarks.on_gpu.timing import copy_gb_s

NO_GPU: Final = "gpu.py needs a CUDA device, and torch finds none"


@dataclass(frozen=True)
class Section:
    """A part of the run, and the seconds after which it begins no further point."""

    run: Callable[[Run], None]
    seconds: float


SECTIONS: Final = {
    "correctness": Section(correctness.run, 120),
    "sgmv": Section(sgmv.run, 75),
    "attention": Section(attention.run, 30),
    "delta": Section(delta.run, 15),
    "step": Section(step.run, 115),
    "serving": Section(serving.run, 120),
    "tune": Section(tune.run, 300),
}
DEFAULT: Final = ("correctness", "sgmv", "attention", "delta", "step", "serving")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 0 when all was measured, 1 when something is wrong or failed, 2 without a GPU."""
    options = _parser().parse_args(arguments)
    scale = Scale.REHEARSAL if options.dry else Scale.QUICK if options.quick else Scale.FULL
    if scale is Scale.REHEARSAL:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the first kernel is launched
    elif not torch.cuda.is_available():
        sys.stderr.write(f"{NO_GPU}\n")
        return 2
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    device: Device = Rehearsal() if scale is Scale.REHEARSAL else Gpu()
    about = machine.describe(device)
    run = Run(Machine(device, copy_gb_s(device)), scale)
    about["copy"] = "rehearsal" if device.rehearses else f"{run.machine.copy_gb_s:.0f} GB/s read and written"
    names = dict.fromkeys(options.only or DEFAULT)
    status, report = measure(run, {name: SECTIONS[name] for name in names}, about, options.json)
    print(report.text())
    return status


def measure(
    run: Run, sections: Mapping[str, Section], about: Mapping[str, str], target: Path | None = None
) -> tuple[int, Report]:
    """Run sections in order; return the exit status and what was measured.

    Correctness that fails ends the run. The report is written after every section, for a run may be cut off.
    """
    status, began = 0, time.monotonic()
    report = Report(about, run.rows, run.notes)
    for name, section in sections.items():
        status = max(status, _section(run, name, section))
        report = Report({**about, "took": f"{time.monotonic() - began:.0f} s"}, run.rows, run.notes)
        if target is not None:
            target.write_text(report.as_json() + "\n")
        if status and name == "correctness":
            break
    return status, report


def _section(run: Run, name: str, section: Section) -> int:
    """Run a section; one that fails leaves the others their turn."""
    device = run.device
    run.begin(name, section.seconds)
    try:
        section.run(run)
    except Exception as error:  # noqa: BLE001 - whatever it is, what was measured before must not be lost
        run.say(traceback.format_exc())
        run.note(f"FAILED: {type(error).__name__}: {error}")
        return 1
    finally:
        gc.collect()
        if not device.rehearses:
            torch.cuda.empty_cache()
    if not device.rehearses:
        run.note(f"at the end {machine.query(machine.STATE)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", choices=SECTIONS, help="repeatable; tune is measured only when named"
    )
    parser.add_argument("--quick", action="store_true", help="a few points of each section")
    parser.add_argument(
        "--tune", action="append_const", const="tune", dest="only", help="the same as --only tune"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file of the same as JSON")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU, without times")
    return parser


if __name__ == "__main__":
    sys.exit(main())
