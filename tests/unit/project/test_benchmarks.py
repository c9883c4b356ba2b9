"""The reports of ``benchmarks``, and ``benchmarks/streams.py`` at a size that takes no time."""

import asyncio
import gc
import json
import math
import sys

import pytest

from benchmarks.figures import Figure
from benchmarks.serving import Bar, Figures, report
from benchmarks.streams_clients import one_round
from benchmarks.streams_server import Instant, serve
from tests.support.waiting import bounded, until


@pytest.mark.parametrize(
    ("found", "bar", "met"),
    [(1.0, 1.5, True), (1.5, 1.5, True), (1.6, 1.5, False), (9.0, None, True), (math.nan, 1.0, False)],
)
def test_a_bar_is_met_up_to_itself(found: float, bar: float | None, met: bool) -> None:
    """Every figure without a bar is met; a section that could not measure has not passed."""
    assert Figure("f", found, "x", bar).met is met


@pytest.mark.parametrize(("least", "status"), [(1.5, 0), (2.0, 0), (2.1, 1)])
def test_a_table_says_whether_a_contender_is_fast_enough(
    least: float, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ratio below its bar at any load is exit status 1; a bar of a contender that did not run is left out."""
    table = {
        "ours": [Figures(90, 0.5), Figures(80), Figures(70)],
        "peer": [Figures(30), Figures(40), Figures(35)],
    }
    bars = [
        Bar("ours / peer", "ours", "peer", (3.0, least, 2.0)),
        Bar("ours / other", "ours", "other", (9, 9, 9)),
    ]
    assert report(table, bars) == status
    printed = capsys.readouterr().out
    assert f"3.00 / 2.00 / 2.00   bar 3 / {least:g} / 2" in printed
    assert "500 ms" in printed
    assert "other" not in printed


async def test_both_apis_answer_clients_that_parse_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """The benchmark's raw clients get every token of forty streams over gRPC and over HTTP."""
    interval_s, device = sys.getswitchinterval(), Instant(0.001)
    serving = asyncio.create_task(serve(device))
    try:
        printed = await until(
            lambda: capsys.readouterr().out.partition("\n")[0], "the addresses of both servers"
        )
        for api, address in json.loads(printed).items():
            async with bounded("both rounds"):
                firsts, ends = await asyncio.to_thread(lambda: list(one_round(api, address, 40, 3)))  # noqa: B023
            assert len(firsts) == len(ends) == 40
            assert 0 < min(firsts) <= min(ends)
            steps, tokens = json.loads(device.report())
            assert (len(steps) >= 3, tokens) == (True, 120)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        gc.unfreeze()
        sys.setswitchinterval(interval_s)
