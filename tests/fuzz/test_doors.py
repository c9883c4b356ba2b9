"""Mutated requests at every door: an answer or a named fault, soon, in few bytes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from random import Random

import pytest
import pytest_asyncio
from google.protobuf.json_format import MessageToDict, Parse, ParseError
from google.protobuf.message import Message

from tests.fuzz.doors import BODIES, Doors, open_doors
from tests.fuzz.mutate import bounded, json_text, mutated_json, mutations

pytestmark = pytest.mark.asyncio(loop_scope="module")
SHORT = range(400)
LONG = (range(2000), range(2000, 20_000))
"""In two parts, each with the memory that a run may take: in the first, libraries fill their caches."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def doors(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Doors]:
    """All doors."""
    async with open_doors(tmp_path_factory.mktemp("doors")) as opened:
        yield opened


async def bodies(doors: Doors, cases: range) -> None:
    """Send mutated bodies; the number of a case is its seed."""
    with bounded() as watch:
        for number in cases:
            rng = Random(number)
            path = rng.choice(sorted(BODIES))
            body = json_text(mutated_json(BODIES[path][1], rng), rng)
            with watch.case(f"{path} {number}"):
                watch.note(await doors.post(path, body))
    assert watch.outcomes["OK"] > len(cases) / 100


async def calls(doors: Doors, cases: range) -> None:
    """Send mutated messages; the number of a case is its seed."""
    with bounded() as watch:
        for number in cases:
            rng = Random(number)
            method = rng.choice(sorted(doors.messages))
            data = mutated_message(rng.choice(doors.messages[method]), rng)
            with watch.case(f"{method} {number}"):
                watch.note(await doors.call(method, data))
    assert watch.outcomes["OK"] > len(cases) / 100


def mutated_message(valid: Message, rng: Random) -> bytes:
    """Return a message with other values in its fields, or where that makes none, with other bytes."""
    if rng.random() < 0.5:
        text = json.dumps(mutated_json(MessageToDict(valid), rng), ensure_ascii=False)
        try:
            made = Parse(text.encode(errors="replace"), type(valid)(), ignore_unknown_fields=True)
            return made.SerializeToString()
        except (ParseError, ValueError, TypeError, AttributeError, RecursionError):
            pass  # no message can say it
    return mutations(valid.SerializeToString(), rng)


async def test_mutated_bodies(doors: Doors) -> None:
    """Over HTTP, nothing is a failure of the server's."""
    await bodies(doors, SHORT)


async def test_mutated_messages(doors: Doors) -> None:
    """Over gRPC, nothing is INTERNAL, and nothing without a reason of ours."""
    await calls(doors, SHORT)


@pytest.mark.sweep
@pytest.mark.timeout(1800)
async def test_mutated_bodies_at_length(doors: Doors) -> None:
    """The same, many times."""
    for part in LONG:
        await bodies(doors, part)


@pytest.mark.sweep
@pytest.mark.timeout(1800)
async def test_mutated_messages_at_length(doors: Doors) -> None:
    """The same, many times."""
    for part in LONG:
        await calls(doors, part)
