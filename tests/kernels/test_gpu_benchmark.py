"""``benchmarks/gpu.py``, rehearsed where there is no GPU: when there is one, it must work at once."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.on_gpu import correctness, serving, step
from benchmarks.on_gpu.correctness import NEEDS_NO_GPU
from benchmarks.on_gpu.device import ROOT, Device
from benchmarks.on_gpu.run import FLOOR, OF_BASE, OF_FLOOR, Row, Run, formatted
from benchmarks.on_gpu.sgmv import LINEARS, Linear, Point
from benchmarks.on_gpu.tune import candidates
from tests.kernels import sgmv_case

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")


@without_gpu
@pytest.mark.parametrize(
    "section",
    [
        pytest.param(name, marks=[pytest.mark.sweep] if name in ("step", "serving") else [])
        for name in gpu.SECTIONS
    ],
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


def _rehearsal() -> Run:
    return Run(Device())


def _fails(_: Run) -> None:
    raise RuntimeError("out of memory")


def _measures(run: Run) -> None:
    run.add({"point": 1}, {"us": math.nan})


@pytest.mark.parametrize("error", [0.5, math.nan])
def test_red_stops_the_run(error: float) -> None:
    """A kernel that is wrong, or gives no number, is named with its error; nothing is timed; exit status 1."""
    checks: dict[str, correctness.Check] = {"off": lambda _: (error, 0.1), "next": lambda _: (0.0, 0.1)}
    run = _rehearsal()
    sections = {
        "correctness": (lambda run: correctness.run_checks(run, checks), 60.0),
        "sgmv": (_measures, 60.0),
    }
    assert gpu.measure(run, sections) == 1
    assert run.notes == [f"correctness: FAILED: Red: off: error {error:.3g}, at most 0.1 is right"]
    assert [row.point for row in run.rows] == [{"check": "off"}]


def test_a_section_that_fails_leaves_the_others_their_turn() -> None:
    """Measurements stand beside failures; the exit status is 1."""
    run = _rehearsal()
    assert gpu.measure(run, {"step": (_fails, 60.0), "sgmv": (_measures, 60.0)}) == 1
    assert run.notes == ["step: FAILED: RuntimeError: out of memory"]
    assert [row.section for row in run.rows] == ["sgmv"]


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
    run = Run(Device(), rows=rows)
    assert [each["met"] for each in run.verdicts()] == [True, False, True, None, None, False]
    assert [each["worst"] for each in run.verdicts()] == [0.96, 0.79, 0.995, None, None, 1.6]
    text = run.text()
    assert "MISSED        step, 16 adapters: at least 0.90: 0.790 at loaded 64, active 16" in text
    assert "met           step, 1-8 adapters" in text
    assert "not measured  serving, 16 adapters" in text


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


def test_peers_get_the_same_checkpoint_and_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those that are installed are started, with every adapter by its name."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "sglang" or None)
    [(name, command)] = serving.peers(tmp_path, ["lora0", "lora1"]).items()
    assert name == "sglang"
    assert command[:3] == ["sglang.launch_server", "--model-path", str(tmp_path / "base")]
    assert command[-2:] == [f"{each}={tmp_path}/adapters/{each}" for each in ("lora0", "lora1")]


def test_the_grids_cover_every_axis() -> None:
    """All widths, ranks, batches and adapters are there, and no point has adapters without a row."""
    assert {point.hidden for point in LINEARS} == {2048, 4096, 8192}
    assert {point.rank for point in LINEARS} == {8, 16, 64}
    assert {1, 8, 32, 64, 128, 256} <= {point.batch for point in LINEARS}
    assert {1, 2, 8, 16, 32, 64} <= {point.adapters for point in LINEARS}
    assert all(point.adapters <= point.batch for point in LINEARS)
    assert step.FULL.loaded == (0, 1, 8, 16, 64)
    assert max(seconds for _, seconds in gpu.SECTIONS.values()) <= 480


def test_the_tests_that_are_left_out_exist() -> None:
    """Each excluded test exists, so that a renamed file is noticed."""
    assert all((ROOT / "tests/kernels" / name).is_file() for name in NEEDS_NO_GPU)


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
