"""``benchmarks/gpu.py``, rehearsed where there is no GPU: when there is one, it must work at once."""

import math
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.on_gpu import correctness
from benchmarks.on_gpu.device import ROOT, Device
from benchmarks.on_gpu.run import FLOOR, OF_BASE, OF_FLOOR, Row, Run
from benchmarks.on_gpu.sgmv import Linear, Point
from benchmarks.on_gpu.tune import candidates
from tests.kernels import sgmv_case
from tests.kernels.place import COMPILED

SWEPT = pytest.mark.sweep
without_gpu = pytest.mark.skipif(COMPILED, reason="a rehearsal is for machines without a GPU")


@without_gpu
@pytest.mark.parametrize(
    "section",
    [pytest.param(name, marks=[SWEPT] if name in ("step", "serving") else []) for name in gpu.SECTIONS],
)
def test_every_section_runs_to_its_end(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every section runs at tiny sizes in the interpreter; what a card would time is "rehearsal"."""
    assert gpu.main(["--dry", "--only", section]) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert f"\n{section}\n" in output
    assert "rehearsal" in output
    assert output.count("  not measured  ") == 6


@without_gpu
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """The benchmark prints one line, and ends with status 2."""
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.splitlines() == [gpu.NO_GPU]


@pytest.mark.parametrize("error", [0.5, math.nan])
def test_red_stops_the_run(error: float) -> None:
    """A kernel that is wrong, or gives no number, is named with its error; nothing is timed; exit status 1."""
    checks: dict[str, correctness.Check] = {"off": lambda _: (error, 0.1), "next": lambda _: (0.0, 0.1)}
    run, late = Run(Device()), list[Run]()
    sections = {
        "correctness": (lambda run: correctness.run_checks(run, checks), 60.0),
        "sgmv": (late.append, 60.0),
    }
    assert gpu.measure(run, sections) == 1
    assert not late
    assert run.notes == [f"correctness: FAILED: Red: off: error {error:.3g}, at most 0.1 is right"]
    assert [row.point for row in run.rows] == [{"check": "off"}]


def _row(section: str, figure: str, value: float, **point: int) -> Row:
    return Row(section, point, {FLOOR: float(point.get("hidden", 0)), figure: value})


def test_the_worst_row_decides_a_target() -> None:
    """Each target reads its own rows alone, and names the worst one."""
    of_base = (1, 0.97), (8, 0.96), (16, 0.79), (64, 0.2), (0, 0.995), (8, math.nan)
    rows = [_row("step", OF_BASE, value, loaded=64, active=active) for active, value in of_base]
    rows += [_row("sgmv", OF_FLOOR, value, hidden=hidden) for hidden, value in ((9, 9.0), (10, 1.6), (11, 1.2))]
    run = Run(Device(), rows=rows)
    assert [each["met"] for each in run.verdicts()] == [True, False, True, None, None, False]
    assert [each["worst"] for each in run.verdicts()] == [0.96, 0.79, 0.995, None, None, 1.6]
    text = run.text()
    assert "MISSED        step, 16 adapters: at least 0.90: 0.790 at loaded 64, active 16" in text
    assert "met           step, 1-8 adapters" in text
    assert "not measured  serving, 16 adapters" in text


@without_gpu
def test_candidates_compute_the_same() -> None:
    """Other tiles give the shipped result: else a wrong kernel could win."""
    torch.manual_seed(3)
    linear = Linear.make(Device(), Point(hidden=64, rank=8, batch=5, adapters=2))
    before = linear.out.clone()
    case = sgmv_case.Case(linear.x, linear.out, linear.group, linear.segments, linear.workspace)
    tried = list(candidates(linear, 8))
    assert len({name for name, _ in tried}) == len(tried)
    for _, launches in (tried[0], tried[-1]):
        linear.out.copy_(before)
        for launch in launches():
            launch()
        assert sgmv_case.relative_errors(linear.out, before, case).max() <= 1e-5


@pytest.mark.sweep
@without_gpu
def test_nothing_but_a_gpu_is_missing() -> None:
    """With kernels that are compiled, the first section fails for want of a GPU alone, and else passes."""
    tests = [
        correctness.FOLDER,
        *(f"--ignore={correctness.FOLDER}/{name}" for name in correctness.NEEDS_NO_GPU),
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "no GPU" in done.stdout
