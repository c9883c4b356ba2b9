"""How a build looks on a terminal and elsewhere, with few adapters and with many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from io import StringIO

import pytest

from loramux.cli.build_view import ROWS, BuildView, show_built
from loramux.cli.shell import Screen
from loramux.records import AdapterInfo, DeploymentInfo, DeploymentState, Stage
from loramux_shared.faults import Finding
from loramux_shared.wording import listed

WARNING = Finding(code="W_FP32", where="weights", found="float32")


def adapter(number: int, stage: Stage) -> AdapterInfo:
    """An adapter in a stage."""
    done = stage is Stage.DONE
    return AdapterInfo(
        f"adapter-{number:04}",
        stage,
        0,
        None,
        "ab" * 32,
        (8,),
        ("attn_q",),
        4,
        1000 * done,
        (WARNING,) * done,
        False,
    )


def state(adapters: Sequence[AdapterInfo], ended: bool = False) -> DeploymentInfo:
    """A deployment of adapters."""
    kind = DeploymentState.ACTIVE if ended else DeploymentState.BUILDING
    return DeploymentInfo("many", kind, 1, None, None, tuple(adapters), None, False)


def build(view: BuildView, count: int) -> list[AdapterInfo]:
    """Show a build in which one adapter after the other is fetched, then all end."""
    adapters = [adapter(number, Stage.WAITING) for number in range(count)]
    view.update(state(adapters))
    for number in range(count):
        adapters[number] = adapter(number, Stage.FETCHING)
        view.update(state(adapters))
        adapters[number] = adapter(number, Stage.DONE)
        view.update(state(adapters))
    view.update(state(adapters, ended=True))
    return adapters


def test_many_adapters_are_counted_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Of sixty adapters only sums are told: at the beginning, now and then, and at the end."""
    build(BuildView(counts_s=3600), 60)
    assert capsys.readouterr().err.splitlines() == ["60 adapters: 60 waiting", "60 adapters: 60 done"]


def test_few_adapters_are_told_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Of few adapters each stage of each is a line."""
    build(BuildView(), 2)
    assert capsys.readouterr().err.splitlines() == [
        *("adapter-0000: fetching", "adapter-0000: done"),
        *("adapter-0001: fetching", "adapter-0001: done"),
    ]


@pytest.mark.parametrize("count", [3, 300])
def test_a_terminal_is_not_drawn_for_every_adapter(count: int) -> None:
    """What a terminal is sent depends on its height, not on the number of adapters; the end shows all done."""
    screen = StringIO()
    with BuildView(console=Screen(file=screen, force_terminal=True, width=100, height=12)) as view:
        build(view, count)
    text = screen.getvalue()
    assert len(text) < 100_000
    last = text[text.rindex("adapter-0002" if count == 3 else "300 adapters") :]
    assert "done" in last


def test_the_table_of_many_adapters_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    """The first rows and a count are shown; a warning that sixty adapters have is told once, with names."""
    adapters = [adapter(number, Stage.DONE) for number in range(60)]
    adapters[7] = replace(adapters[7], warnings=(WARNING, replace_code(WARNING)))
    show_built(state(adapters, ended=True))
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) == 1 + ROWS + 2
    assert lines[-2] == "... and 40 more, 60.0 kB in all (all of them: --json)"
    assert said.err.splitlines() == [
        "warning: W_FP32 adapter-0000: weights: found float32",
        "  and so adapter-0001, adapter-0002, adapter-0003, adapter-0004, adapter-0005 and 54 more",
        "warning: W_ALPHA adapter-0007: weights: found float32",
    ]


def replace_code(finding: Finding) -> Finding:
    """The same finding with another code."""
    return finding.model_copy(update={"code": "W_ALPHA"})


def test_lists_of_names_end() -> None:
    """A list in a message names some and counts the rest."""
    assert listed([]) == "none"
    assert listed(["a", "b"], 2) == "a, b"
    assert listed(["a", "b", "c", "d"], 2) == "a, b and 2 more"
