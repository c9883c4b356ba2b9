"""Shares of what is scarce, by API key."""

import asyncio
from collections import Counter
from collections.abc import Awaitable

import pytest
from hypothesis import given, strategies as st

from loramux_shared.access.asgi import AccessMiddleware, App, Message
from loramux_shared.access.keyring import Keyring
from loramux_shared.access.shares import Shares, is_in_share
from loramux_shared.faults import Fault, QueueFull
from tests.support.access import lines, new_entry
from tests.support.waiting import result_of, until


@given(places=st.integers(1, 100), keys=st.integers(1, 20))
def test_keys_leave_places_for_others(places: int, keys: int) -> None:
    """A key that is alone has all but one of the places, and the next one finds a place at once."""
    shares, held = Shares(places), Counter[str]()
    for key_id in map(str, range(keys)):
        while shares.may_take(key_id):
            shares.take(key_id)
            held[key_id] += 1
        assert held["0"] == max(1, places - 1)
        assert held[key_id] or shares.taken == places
    assert shares.taken == held.total() <= places


@given(places=st.integers(1, 100), keys=st.integers(1, 20))
def test_busy_keys_come_to_equal_shares(places: int, keys: int) -> None:
    """A key that had more than the others has its part when its places came back once."""
    shares, held = Shares(places), Counter[str]()
    names = [str(number) for number in range(keys)]
    for _ in range(3 * places):
        for key_id in names:
            if shares.may_take(key_id):
                shares.take(key_id)
                held[key_id] += 1
        busiest = max(names, key=lambda key_id: held[key_id])
        shares.give_back(busiest)
        held[busiest] -= 1
    assert max(held.values()) - min(held[name] for name in names) <= 1


def test_calls_without_a_key_have_all() -> None:
    """Such calls are one caller; where all is taken, the refusal is another than for a share."""
    shares = Shares(2)
    with (
        shares.held("", "x"),
        shares.held("", "x"),
        pytest.raises(QueueFull, match="there is none free of 2 places for x"),
        shares.held("", "x"),
    ):
        pass
    with (
        shares.held("a", "x"),
        pytest.raises(QueueFull, match="this key has its share of 2 places for x"),
        shares.held("a", "x"),
    ):
        pass
    assert (shares.taken, is_in_share("a", {"a": 1}, 2), is_in_share("", {"": 1}, 2)) == (0, False, True)


async def test_a_place_that_comes_free_goes_to_a_key_with_a_share_left() -> None:
    """The order is that of arrival otherwise, and a caller that is cancelled leaves nothing behind."""
    shares, order = Shares(2), list[str]()

    async def work(name: str, done: asyncio.Event) -> None:
        async with shares.awaited(name[0], "x"):
            order.append(name)
            await done.wait()

    done = {name: asyncio.Event() for name in ("a1", "a2", "a3", "b1", "c1")}
    tasks = {name: asyncio.create_task(work(name, each)) for name, each in done.items()}
    await until(lambda: order == ["a1", "b1"], "two that have places", lambda: order)
    tasks["a2"].cancel()
    done["b1"].set()
    await until(lambda: order[2:] == ["c1"], "the next key's turn", lambda: order)
    for each in done.values():
        each.set()
    await result_of(asyncio.gather(*tasks.values(), return_exceptions=True), "all")
    assert (order[3:], shares.taken) == (["a3"], 0)


async def test_one_key_does_not_hold_all_open_requests() -> None:
    """A key that is alone has all but one, the next finds the last, and of two busy keys each comes to half."""
    (mine, me), (theirs, them) = new_entry("me", "infer"), new_entry("them", "infer")
    answered, go = list[str](), asyncio.Event()

    async def app(scope: Message, _receive: object, _send: object) -> None:
        answered.append(scope["caller"])
        await go.wait()

    def refusal(scope: Message, fault: Fault) -> App:
        async def refuse(_scope: Message, _receive: object, _send: object) -> None:
            answered.append(f"{scope['caller']} {fault.reason}")

        return refuse

    def call(caller: str, key: str) -> Awaitable[None]:
        scope = {"type": "http", "path": "/", "caller": caller, "headers": [(b"x-api-key", key.encode())]}
        return guarded(scope, _nothing, _nothing)

    ring = Keyring(text=lines(me, them))
    guarded = AccessMiddleware(app, ring, lambda _: me.scopes[0], refusal, Shares(5))
    alone = ["me"] * 4 + ["me QUEUE_FULL", "them"]
    for expected in (alone, ["me", "them"] * 2 + ["me QUEUE_FULL", "them QUEUE_FULL"]):
        names = [each.partition(" ")[0] for each in expected]
        keys = {"me": mine, "them": theirs}
        calls = [asyncio.ensure_future(call(name, keys[name])) for name in names]
        await until(lambda: len(answered) == len(calls), "all calls", lambda: answered)  # noqa: B023 - awaited
        assert answered == expected
        go.set()
        await result_of(asyncio.gather(*calls), "the answers")
        go.clear()
        answered.clear()


async def _nothing(*_: object) -> Message:
    return {}
