"""Everything that one GPU can tell, in one command: is it right, and how fast is it.

Correctness comes first and stops the run when it is red. Then, each against its floor, its peer or its target:
kernels, a decode step of an 8B-shaped random model, and serving. No network; each section ends within 8 minutes
and can be run alone. A table is printed last, and says for every target whether it is met; rows are printed on
standard error as they come.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --only sgmv --only step
    python -m benchmarks.gpu --only tune
    python -m benchmarks.gpu --dry
"""

import argparse
import gc
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch

from benchmarks.on_gpu import correctness, serving, sgmv, step, tune
from benchmarks.on_gpu.device import Device, Gpu, describe, state
from benchmarks.on_gpu.run import Run

NO_GPU: Final = "gpu.py needs a CUDA device, and torch finds none"
Section = tuple[Callable[[Run], None], float]
"""A part of the run, and the seconds after which it begins no further point."""
SECTIONS: Final[Mapping[str, Section]] = {
    "correctness": (correctness.run, 300),
    "sgmv": (sgmv.run, 90),
    "step": (step.run, 300),
    "serving": (serving.run, 360),
    "tune": (tune.run, 300),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 0 when all was measured, 1 when something is wrong or failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=SECTIONS, help="repeatable; tune must be named")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU, without times")
    options = parser.parse_args(arguments)
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the first kernel is launched
    elif not torch.cuda.is_available():
        sys.stderr.write(f"{NO_GPU}\n")
        return 2
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    device: Device = Device() if options.dry else Gpu()
    run = Run(device, describe(device))
    names = dict.fromkeys(options.only or [name for name in SECTIONS if name != "tune"])
    status = measure(run, {name: SECTIONS[name] for name in names})
    print(run.text())
    return status


def measure(run: Run, sections: Mapping[str, Section]) -> int:
    """Run sections in order; return the exit status.

    Correctness that fails ends the run; any other section that fails leaves the others their turn.
    """
    status = 0
    for name, (work, seconds) in sections.items():
        run.begin(name, seconds)
        try:
            work(run)
        except Exception as error:  # noqa: BLE001 - whatever it is, what was measured before must not be lost
            run.say(traceback.format_exc())
            run.note(f"FAILED: {type(error).__name__}: {error}")
            status = 1
        gc.collect()
        if not run.device.rehearses:
            torch.cuda.empty_cache()
            run.note(f"at the end {state()}")
        if status and name == "correctness":
            break
    return status


if __name__ == "__main__":
    sys.exit(main())
