"""``benchmarks/streams.py`` at a size that takes no time, and what it says of what it measured."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import sys

import pytest

from benchmarks.servers.clients import Steady, clients_of, first_tokens_s
from benchmarks.servers.server import serve
from benchmarks.streams import Firsts, Point, figures
from tests.support.waiting import bounded, until


async def test_both_apis_answer_clients_that_parse_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Each stream has a first token, after it began and before it ended."""
    interval_s = sys.getswitchinterval()
    serving = asyncio.create_task(serve(step_s=0.001, interval_s=0.0))
    try:
        output = await until(
            lambda: capsys.readouterr().out.partition("\n")[0], "the addresses of both servers"
        )
        for kind, address in json.loads(output).items():
            async with bounded("first tokens"), clients_of(kind, address, 2) as opened:
                found = await first_tokens_s(opened, 40, 3)
            assert len(found) == 40
            assert all(each > 0 for each in found)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        gc.unfreeze()
        sys.setswitchinterval(interval_s)


def _point(clients: str, streams: int, begin_s: float) -> Point:
    firsts = Firsts(begin_s, begin_s, begin_s, begin_s)
    return Point(clients, streams, firsts, firsts, Steady(1.0, 0.1, 0.1, 0.1), 0.5, 50.0)


@pytest.mark.parametrize(
    ("at_500", "at_1000", "met"),
    [(0.5, 0.9, [True] * 3), (0.3, 0.9, [True, True, False]), (0.9, math.inf, [False] * 3)],
)
def test_bars_are_of_a_thousand_streams_and_of_growth(at_500: float, at_1000: float, met: list[bool]) -> None:
    """Other kinds of clients and other numbers are reported for their own sake."""
    points = [_point("http", 500, at_500), _point("grpc/1", 2000, 9.0), _point("http", 1000, at_1000)]
    assert [figure.met for figure in figures(points)] == met
