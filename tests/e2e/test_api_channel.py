"""Messages between the engine's process and API processes."""

import asyncio
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, MagicMock, call

import pytest

from inference_service.api.processes import host, messages
from inference_service.api.processes.channel import MOST_UNREAD, Channel
from inference_service.api.processes.host import ApiHost, ApiPeer, RelayedOutputs
from inference_service.api.processes.remote import RemoteApi, served_to
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence
from inference_service.core.served_model import ServedModel
from inference_service.driver.engine_thread import MakeOutputs
from inference_service.driver.port import Submission
from loramux_shared.access.keys import EVERYTHING
from loramux_shared.faults import Fault, ReplicaFailed, RequestInvalid
from tests.support.apart import Loopback, connect
from tests.support.services.silent import silent_service
from tests.support.waiting import until


async def passed(value: Any) -> Any:
    found: list[Any] = []
    one, other = Channel({}, {}, lambda: None), Channel({"value": found.append}, {}, lambda: None)
    connect(one, other)
    one.say("value", value)
    await until(lambda: found, "a message")
    return found[0]


async def test_a_sampling_arrives_as_it_was() -> None:
    """Bad words too, whose keys are no texts."""
    words = {0: {(): (4, 5)}, 2: {(1, 2): (3,), (7, 8): (9,)}}
    sampling = SamplingParams(temperature=0.5, stop_token_ids=frozenset({1, 2}), bad_words=words)
    assert messages.sampling_from(await passed(messages.sampling_to(sampling))) == sampling


async def test_what_is_asked_is_answered_refused_or_cancelled() -> None:
    """A fault arrives as itself, an unexpected error by the name INTERNAL, and giving up reaches the peer."""
    begun, given_up = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()

    async def refuse() -> None:
        raise RequestInvalid("not so.")

    async def break_() -> None:
        raise KeyError("secret")

    async def double(number: int) -> int:
        return 2 * number

    lost: list[bool] = []
    one = Channel({}, {}, lambda: lost.append(True))
    other = Channel({}, {"wait": wait, "refuse": refuse, "break": break_, "double": double}, lambda: None)
    connect(one, other)
    assert await one.ask("double", 4) == 8
    with pytest.raises(RequestInvalid, match="not so"):
        await one.ask("refuse")
    with pytest.raises(Fault, match="failed inside") as raised:
        await one.ask("break")
    assert raised.value.reason == "INTERNAL"
    waiting = asyncio.ensure_future(one.ask("wait"))
    await until(begun.is_set, "the call")
    waiting.cancel()
    await until(given_up.is_set, "the peer's end of it")
    begun.clear(), given_up.clear()
    last = asyncio.ensure_future(one.ask("wait"))
    await until(begun.is_set, "another call")
    other.close()
    with pytest.raises(ReplicaFailed):
        await last
    await until(given_up.is_set, "the end of what a lost peer asked for")
    assert not one._waiting
    await until(lambda: lost == [True], "word of the loss")
    with pytest.raises(ReplicaFailed):
        await one.ask("double", 4)


async def test_a_peer_that_does_not_read_costs_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel whose peer leaves too much unread is closed."""
    lost: list[bool] = []
    one, other = Channel({}, {}, lambda: lost.append(True)), Channel({}, {}, lambda: None)
    connect(one, other)
    monkeypatch.setattr(Loopback, "get_write_buffer_size", lambda _: MOST_UNREAD + 1)
    one.say("out", [])
    await until(lambda: lost, "the end of the channel")
    assert not one.is_open


async def test_a_process_that_is_lost_leaves_nothing() -> None:
    """A lost process has no sequences, limits or counts left; counts need no scrape that waits for them."""
    engine, closed = MagicMock(), list[str]()
    work, place = engine.service.add_in_work, engine.service.local.admit.return_value
    seqs = [Sequence(name, [5], SamplingParams()) for name in "ab"]

    async def submit(_: Submission, make: MakeOutputs) -> None:
        make(seqs, closed.append, None)

    place.__enter__.return_value.submit = submit
    peer = ApiPeer(engine, lost := MagicMock())
    channel = Channel({}, {"collect": lambda: api.collect()}, lambda: None)
    collecting: asyncio.Task[None]
    metrics = MagicMock(take=lambda: collecting.cancel() and [[], [], {}])
    api: RemoteApi = RemoteApi(channel, MagicMock(in_work=2), MagicMock(), metrics)
    connect(peer.channel, channel)
    submission = Submission(ServedModel("base"), [5], SamplingParams(), n=2)
    await channel.ask("submit", 7, messages.access_to(EVERYTHING), messages.submission_to(submission))
    collecting = asyncio.ensure_future(peer.collect())
    await until(lambda: work.called, "the counts")
    assert not place.__exit__.called
    peer.channel.connection_lost(None)
    assert (closed, work.mock_calls) == (["a", "b"], [call(2), call(-2)])
    assert place.__exit__.call_count == lost.call_count == 1
    assert engine.peers.discard.mock_calls == [call(peer)]


@pytest.mark.parametrize("refused", [False, True])
async def test_an_api_process_forgets_what_has_ended(tmp_path: Path, refused: bool) -> None:
    """A request that leaves, or is refused, is dropped at the engine too, and nothing of it stays."""
    channel = MagicMock(ask=AsyncMock(side_effect=RequestInvalid("not so.") if refused else None), handlers={})
    service = silent_service(tmp_path)
    driver = RemoteApi.open(channel, served_to(service), service.parsers_of).driver
    with pytest.raises(RequestInvalid) if refused else nullcontext():
        (await driver.submit(Submission(ServedModel("base"), [5], SamplingParams(), n=2))).close()
    channel.handlers["out"]([(0, 0, [None])])  # nobody reads what came on its way: it is not even decoded
    assert sorted(each.args for each in channel.say.call_args_list) == [("drop", 0, 0), ("drop", 0, 1)]


async def test_outputs_wait_together_for_a_process_that_is_behind(tmp_path: Path, monkeypatch) -> None:
    """Outputs join while a process has much to read; those that begin or end go first; later it is lost."""
    monkeypatch.setattr(host, "TOGETHER", 2)
    found: list[Any] = []
    lost: list[bool] = []
    peer = ApiPeer(ApiHost(silent_service(tmp_path), keyless=True), lambda: lost.append(True))
    connect(
        peer.channel, Channel({"out": found.append, "end": lambda *end: found.append(end)}, {}, lambda: None)
    )
    peer.send((1, 0), ["a"])
    await until(lambda: found, "the first outputs")
    peer.channel.pause_writing()
    for number, output, urgent in ((1, "b", False), (2, "c", False), (3, "x", True), (1, "d", True)):
        peer.send((number, 0), [output], urgent=urgent)
        await asyncio.sleep(0)
    assert len(found) == 1
    peer.channel.resume_writing()
    await until(lambda: len(found) == 3, "the others")
    assert found == [[[1, 0, ["a"]]], [[3, 0, ["x"]], [1, 0, ["b", "d"]]], [[2, 0, ["c"]]]]
    ended = RelayedOutputs([Sequence("a", [5], SamplingParams())], MagicMock(), None, peer, 4, MagicMock())
    peer.send((4, 0), ["last"])
    ended.fail(ReplicaFailed("it ended"))
    await until(lambda: found[-1][0] == 4, "the end")
    assert found[-2] == [[4, 0, ["last"]]]
    monkeypatch.setattr(host, "MOST_PENDING", 2)
    peer.channel.pause_writing()
    peer.send((1, 0), ["e", "f"])
    await asyncio.sleep(0)
    assert not lost, "what was sent counts no longer"
    peer.send((1, 0), ["g"])
    await until(lambda: lost, "the end of the channel")
