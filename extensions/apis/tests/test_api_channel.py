"""Messages between the engine's process and API processes."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inference_service.adapters.served_model import NO_DEFAULTS, ServedModel
from inference_service.core.adapter import Adapter, Mixture
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import EndReason, Sequence, StepOutput, Token
from loramux_apis import host, messages
from loramux_apis.channel import MOST_UNREAD, Channel
from loramux_apis.host import ApiHost, ApiPeer
from loramux_shared.access.keys import EVERYTHING, Access, Scope
from loramux_shared.faults import Fault, Finding, ReplicaFailed, RequestInvalid
from loramux_shared.runtime import Limits
from tests.apart import Loopback, connect
from tests.support.silent import silent_service
from tests.support.waiting import until


async def passed(value: Any) -> Any:
    """Return the value as the peer gets it."""
    found: list[Any] = []
    one, other = Channel({}, {}, lambda: None), Channel({"value": found.append}, {}, lambda: None)
    connect(one, other)
    one.say("value", value)
    await until(lambda: found, "a message")
    return found[0]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(
            max_tokens=7,
            temperature=0.5,
            seed=2**63 - 1,
            stop_token_ids=frozenset({1, 2}),
            logit_bias={3: -1.5},
            allowed_token_ids=b"\xff\x00",
            bad_words={0: {(): (4, 5)}, 2: {(1, 2): (3,), (7, 8): (9,)}},
            logprobs=3,
            logprobs_mode="processed",
            prompt_logprobs=0,
        ),
    ],
)
async def test_a_sampling_arrives_as_it_was(sampling: SamplingParams) -> None:
    """All fields, those that are no plain values too."""
    assert messages.sampling_from(await passed(messages.sampling_to(sampling))) == sampling


@pytest.mark.parametrize(
    "access",
    [
        EVERYTHING,
        Access("key", frozenset({Scope.INFER}), frozenset({"a", "b"}), Limits(weight=2.0, tokens_per_minute=9)),
    ],
)
async def test_rights_arrive_as_they_were(access: Access) -> None:
    assert messages.access_from(await passed(messages.access_to(access))) == access


async def test_a_mixture_arrives_with_the_handles_of_its_adapters() -> None:
    """The engine's process has one handle for each digest, whatever a message names."""
    first, second = Adapter("1" * 64), Adapter("2" * 64, invocation=(5,))
    parts = tuple(
        ServedModel(each.digest[0], each, digest=each.digest, defaults=None) for each in (first, second)
    )
    mixture = Mixture(((first, 0.5), (second, 2.0)))
    model = ServedModel("1*0.5+2*2", digest=mixture.digest, mixture=mixture, parts=parts, defaults=None)
    handles = {each.digest: each for each in (first, second)}
    found = messages.model_from(await passed(messages.model_to(model)), lambda digest, _: handles[digest])
    assert found.mixture == mixture
    assert found.names == ("1", "2")
    assert [part.adapter for part in found.parts] == [first, second]
    base = messages.model_from(await passed(messages.model_to(ServedModel("base"))), lambda *_: first)
    assert base.adapter is None
    assert base.defaults is NO_DEFAULTS


async def test_outputs_arrive_as_they_were() -> None:
    """A plain token is its id alone; the first output brings the engine's notes of the sequence."""
    near, far = (Sequence("0/0", [1, 2, 3], SamplingParams()) for _ in range(2))
    near.progress.num_cached, near.progress.began_s = 2, 4.5
    vector = np.array([0.5, -1.0], np.float32)
    whole = [
        StepOutput("0/0", Token(7, -0.5, ((7, -0.5), (8, float("-inf"))), 1), first=True, prompt=(Token(1),)),
        StepOutput("0/0", Token(9)),
        StepOutput("0/0", None, EndReason.FAILED, fault=RequestInvalid("no.", [Finding(code="E_BAD_FIELD")])),
    ]
    sent = await passed([messages.output_to(each, near) for each in whole])
    assert sent[1] == 9
    found = [messages.output_from(each, far) for each in sent]
    assert found[:2] == whole[:2]
    assert (far.progress.num_cached, far.progress.began_s) == (2, 4.5)
    fault = found[2].fault
    assert isinstance(fault, RequestInvalid)
    assert fault.findings == (Finding(code="E_BAD_FIELD"),)
    pooled = StepOutput("0/0", None, EndReason.LENGTH, pooled=vector)
    back = messages.output_from(await passed(messages.output_to(pooled, near)), far).pooled
    assert back is not None
    assert back.tolist() == vector.tolist()


async def test_what_is_asked_is_answered_refused_or_cancelled() -> None:
    """A fault arrives as itself, an unexpected error by the name INTERNAL, and giving up reaches the peer."""
    given_up = asyncio.Event()

    async def wait() -> None:
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
    await until(lambda: other._working, "the call")
    waiting.cancel()
    await until(given_up.is_set, "the peer's end of it")
    last = asyncio.ensure_future(one.ask("wait"))
    await until(lambda: other._working, "another call")
    other.close()
    with pytest.raises(ReplicaFailed):
        await last
    await until(lambda: lost == [True], "word of the loss")
    with pytest.raises(ReplicaFailed):
        await one.ask("double", 4)


async def test_a_peer_that_does_not_read_costs_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[bool] = []
    one, other = Channel({}, {}, lambda: lost.append(True)), Channel({}, {}, lambda: None)
    connect(one, other)
    monkeypatch.setattr(Loopback, "get_write_buffer_size", lambda _: MOST_UNREAD + 1)
    one.say("out", [])
    await until(lambda: lost, "the end of the channel")
    assert not one.is_open


async def test_outputs_wait_together_for_a_process_that_is_behind(tmp_path: Path, monkeypatch) -> None:
    """Outputs of an answer join while the process has much to read, and a process that never reads is lost."""
    found: list[Any] = []
    lost: list[bool] = []
    peer = ApiPeer(ApiHost(silent_service(tmp_path), keyless=True), lambda: lost.append(True))
    connect(peer.channel, Channel({"out": found.append}, {}, lambda: None))
    peer.send((1, 0), ["a"])
    await until(lambda: found, "the first outputs")
    peer.channel.pause_writing()
    for answer, outputs in (((1, 0), ["b"]), ((2, 0), ["c"]), ((1, 0), ["d"])):
        peer.send(answer, outputs)
        await asyncio.sleep(0)
    assert len(found) == 1
    peer.channel.resume_writing()
    await until(lambda: len(found) == 2, "the others")
    assert found == [[[1, 0, ["a"]]], [[1, 0, ["b", "d"]], [2, 0, ["c"]]]]
    monkeypatch.setattr(host, "MOST_PENDING", 1)
    peer.channel.pause_writing()
    peer.send((1, 0), ["e", "f"])
    await until(lambda: lost, "the end of the channel")
