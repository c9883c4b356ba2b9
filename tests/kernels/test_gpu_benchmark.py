"""``benchmarks/gpu.py``, rehearsed where there is no GPU: when there is one, it must work at once."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.on_gpu import attention, correctness, sgmv, step
from benchmarks.on_gpu.correctness import NEEDS_NO_GPU, QUICK_TESTS
from benchmarks.on_gpu.device import Machine, Rehearsal
from benchmarks.on_gpu.machine import FIXED, ROOT, STATE, read_query
from benchmarks.on_gpu.report import Report, formatted
from benchmarks.on_gpu.run import Run, Scale
from benchmarks.on_gpu.sgmv import Linear, Point
from benchmarks.on_gpu.targets import FLOOR, OF_BASE, OF_FLOOR, Row
from benchmarks.on_gpu.timing import Timing
from benchmarks.on_gpu.tune import Candidate, candidates
from inference_service.kernels.sgmv import reference
from tests.kernels import sgmv_case

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")
TIMED = re.compile(r"us$|^of |/s|ttft")


@without_gpu
@pytest.mark.parametrize(
    "section",
    [
        pytest.param(name, marks=[pytest.mark.sweep] if name in ("step", "serving") else [])
        for name in gpu.SECTIONS
    ],
)
def test_every_section_runs_to_its_end(
    section: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every section runs at tiny sizes in the interpreter, with "rehearsal" for times, and null in the JSON."""
    target = tmp_path / "gpu.json"
    status = gpu.main(["--dry", "--only", section, "--json", str(target)])
    output = capsys.readouterr()
    assert status == 0, output.err
    found = json.loads(target.read_text())
    assert found["rows"]
    assert {row["section"] for row in found["rows"]} == {section}
    times = [value for row in found["rows"] for name, value in row.items() if TIMED.search(name)]
    assert times or section == "correctness"
    assert set(times) <= {None}
    assert f"\n{section}\n" in output.out
    assert "rehearsal" in output.out
    assert [each["met"] for each in found["targets"]] == [None] * 7
    assert found["machine"].keys() >= {"card", "torch", "triton", "commit", "copy"}


@without_gpu
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """The benchmark prints one line, and ends with status 2."""
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.splitlines() == [gpu.NO_GPU]


def _rehearsal() -> Run:
    return Run(Machine(Rehearsal(), math.nan), Scale.REHEARSAL)


def _fails(_: Run) -> None:
    raise RuntimeError("out of memory")


def _measures(run: Run) -> None:
    run.add({"point": 1}, {"us": math.nan})


@pytest.mark.parametrize("error", [0.5, math.nan])
def test_red_stops_the_run(error: float) -> None:
    """A kernel that is wrong, or gives no number, is named with its error; nothing is timed; exit status 1."""
    checks: dict[str, correctness.Check] = {"off": lambda _: (error, 0.1), "next": lambda _: (0.0, 0.1)}
    sections = {
        "correctness": gpu.Section(lambda run: correctness.run_checks(run, checks), 60),
        "sgmv": gpu.Section(_measures, 60),
    }
    status, report = gpu.measure(_rehearsal(), sections, {"card": "none"})
    assert status == 1
    assert report.notes == [f"correctness: FAILED: Red: off: error {error:.3g}, at most 0.1 is right"]
    assert [row.point for row in report.rows] == [{"check": "off"}]


def test_a_section_that_fails_leaves_the_others_their_turn(tmp_path: Path) -> None:
    """Measurements stand beside failures, also in the file; the exit status is 1."""
    sections = {"step": gpu.Section(_fails, 60), "attention": gpu.Section(_measures, 60)}
    status, report = gpu.measure(_rehearsal(), sections, {"card": "none"}, tmp_path / "gpu.json")
    assert status == 1
    assert report.notes == ["step: FAILED: RuntimeError: out of memory"]
    assert [row.section for row in report.rows] == ["attention"]
    assert (tmp_path / "gpu.json").read_text() == report.as_json() + "\n"


def _row(section: str, figure: str, value: float, **point: int) -> Row:
    return Row(section, point, {FLOOR: float(point.get("hidden", 0)), figure: value})


def test_the_worst_row_decides_a_target() -> None:
    """Each target reads its own rows alone, and names the worst one."""
    rows = [
        _row("step", OF_BASE, 0.97, loaded=64, active=1),
        _row("step", OF_BASE, 0.96, loaded=64, active=8),
        _row("step", OF_BASE, 0.79, loaded=64, active=16),
        _row("step", OF_BASE, 0.2, loaded=64, active=64),
        _row("step", OF_BASE, 0.995, loaded=64, active=0),
        _row("step", OF_BASE, math.nan, loaded=64, active=8),
        _row("sgmv", OF_FLOOR, 9.0, hidden=9),
        _row("sgmv", OF_FLOOR, 1.6, hidden=10),
        _row("sgmv", OF_FLOOR, 1.2, hidden=11),
    ]
    report = Report({"card": "some"}, rows, [])
    assert [each.met for each in report.verdicts] == [True, False, True, None, None, False, None]
    assert [each.worst for each in report.verdicts] == [0.96, 0.79, 0.995, None, None, 1.6, None]
    text = report.text()
    assert "MISSED        step, 16 adapters: at least 0.90: 0.790 at loaded 64, active 16" in text
    assert "met           step, 1-8 adapters" in text
    assert "not measured  serving, 16 adapters" in text
    assert json.loads(report.as_json())["rows"][5][OF_BASE] is None


def test_points_beyond_the_time_are_left_out_and_named() -> None:
    """A section that is out of time begins no further point, and says which are missing."""
    run = _rehearsal()
    run.begin("some", 0.0)
    run.each(["a", "b"], lambda point: run.add({"point": point}, {}))
    assert run.rows == []
    assert run.notes == ["some: out of time before a; 2 of 2 points left out"]


def test_numbers_have_the_digits_that_count() -> None:
    """A number has three digits, and a missing value is a word or a dash."""
    values = [None, math.nan, "two", 12345.6, 45.67, 1.234, 0.9951, 3]
    assert [*map(formatted, values)] == ["-", "rehearsal", "two", "12346", "45.7", "1.23", "1.00", "3"]


def test_a_timing_is_a_median_and_a_tenth() -> None:
    """A timing is the median and a tenth of single measurements, in any order."""
    assert Timing.of([float(value) for value in range(30, 0, -1)]) == Timing(15.5, 4.0)


def test_what_the_driver_answers_gets_labels() -> None:
    """A line of CSV gets labels; another answer of nvidia-smi is quoted."""
    answer = "1755 MHz, 2619 MHz, 41, 130.51 W, 700.00 W\n"
    assert read_query(STATE, answer) == (
        "sm 1755 MHz, memory 2619 MHz, temperature 41 C, power 130.51 W, limit 700.00 W"
    )
    assert read_query(FIXED, "Field is not valid\n") == "nvidia-smi answers 'Field is not valid'"


def test_the_grids_cover_every_axis() -> None:
    """All widths, ranks, batches and adapters are there, and no point has adapters without a row."""
    points = sgmv.FULL
    assert {point.hidden for point in points} == {2048, 4096, 8192}
    assert {point.rank for point in points} == {8, 16, 64}
    assert {1, 8, 32, 64, 128, 256} <= {point.batch for point in points}
    assert {1, 2, 8, 16, 32, 64} <= {point.adapters for point in points}
    assert all(point.adapters <= point.batch for point in points)
    assert len(set(points)) >= len(points) - 2  # the middle is on several axes
    assert step.FULL.loaded == (0, 1, 8, 16, 64)
    assert {point.context for point in attention.FULL if point.rows == 1} >= {512, 4096}
    assert {attention.SKEWED, attention.PREFIX} <= {*attention.FULL} & {*attention.QUICK}


def test_the_tests_that_are_left_out_exist() -> None:
    """Each excluded test exists, so that a renamed file is noticed."""
    folder = ROOT / "tests/kernels"
    assert all((folder / name).is_file() for name in (*NEEDS_NO_GPU, *QUICK_TESTS))


def _linear() -> Linear:
    torch.manual_seed(3)
    return Linear.make(Rehearsal(), Point(hidden=64, rank=8, batch=5, adapters=2))


@without_gpu
def test_the_peer_computes_the_same() -> None:
    """The baseline of a loop of products computes the same as SGMV."""
    linear = _linear()
    expected = reference.lora_apply(linear.x, linear.out, linear.group, linear.segments, torch.float64)
    linear.loop()
    torch.testing.assert_close(linear.out.double(), expected, rtol=1e-5, atol=1e-5)


@without_gpu
def test_candidates_compute_the_same() -> None:
    """Other tiles, in two launches and in one, give the shipped result: else a wrong kernel could win."""
    linear = _linear()
    before = linear.out.clone()
    case = sgmv_case.Case(linear.x, linear.out, linear.group, linear.segments, linear.workspace)
    tried: list[Candidate] = list(candidates(8))
    assert len(set(map(str, tried))) == len(tried)
    for candidate in (tried[0], tried[-1]):
        linear.out.copy_(before)
        for launch in candidate.launches(linear):
            launch()
        assert sgmv_case.relative_errors(linear.out, before, case).max() <= 1e-5
