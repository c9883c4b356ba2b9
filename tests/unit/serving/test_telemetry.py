"""Telemetry of a request, the format of the log, and the names that gateways see."""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import structlog
from structlog.contextvars import bound_contextvars
from structlog.testing import capture_logs

from inference_service.api.processes.messages import AnswerState
from inference_service.core.request import AnswerDelta, AnswerFinished, Request, TokenUsage
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import EndReason, Token
from inference_service.core.served_model import ServedModel
from inference_service.driver.port import Submission
from inference_service.driver.telemetry.record import RequestFollower, RequestRecord, following
from inference_service.driver.telemetry.request_log import RequestLog
from inference_service.engine.engine import SequenceCounts
from loramux_shared.faults import QueueFull
from loramux_shared.process import log_to_stderr
from tests.golden.metrics.script import replica
from tests.support.metrics import Scrape

DONE = AnswerFinished(EndReason.LENGTH, "", TokenUsage(3, 0, 2))


class Ear:
    """Notes the outcomes of requests."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []

    def began(self, record: RequestRecord) -> None:
        """Hear nothing."""

    def emitted(self, record: RequestRecord, delta: AnswerDelta) -> None:
        """Hear nothing."""

    def ended(self, record: RequestRecord) -> None:
        assert record.duration_s is not None
        self.outcomes.append(record.outcome)


def submit(follower: RequestFollower, answers: int = 1) -> None:
    follower.prepared(Submission(ServedModel("base"), [1, 2, 3], SamplingParams(), n=answers))
    follower.submitted([AnswerState() for _ in range(answers)], time.monotonic())


@pytest.mark.parametrize(
    ("raised", "outcome"),
    [
        (QueueFull("full"), "QUEUE_FULL"),
        (asyncio.CancelledError(), "CANCELLED"),
        (GeneratorExit(), "CANCELLED"),
        (KeyError("bug"), "INTERNAL"),
    ],
)
def test_whatever_ends_a_request_is_its_outcome(raised: BaseException, outcome: str) -> None:
    """A fault by its reason, a client that went away, and a bug; each is raised on, and heard of once."""
    ear = Ear()
    with pytest.raises(type(raised)), following(Request.of("m", "x"), [ear]):
        raise raised
    assert ear.outcomes == [outcome]


@pytest.mark.parametrize(("finished", "outcome"), [((0, 1), "OK"), ((0,), "CANCELLED")])
def test_a_client_that_leaves_with_all_answers_got_them(finished: tuple[int, ...], outcome: str) -> None:
    """A request that is closed behind its last answer is OK; before it, cancelled."""
    ear = Ear()
    following_one = following(Request.of("m", "x", n=2), [ear])
    follower = following_one.__enter__()
    submit(follower, answers=2)
    for index in finished:
        follower.see(AnswerFinished(EndReason.STOP, "", TokenUsage(3), index))
    following_one.__exit__(GeneratorExit, GeneratorExit(), None)
    assert ear.outcomes == [outcome]


def test_the_time_per_token_of_one_token_is_unknown() -> None:
    """The time per token is measured from the second token on."""
    with following(Request.of("m", "x"), []) as follower:
        submit(follower, answers=2)
        follower.see(AnswerDelta("a", (Token(5),), 0))
        follower.see(AnswerDelta("a", (Token(5),), 1))
        follower.see(AnswerDelta("b", (Token(6), Token(7)), 1))
    one, three = follower.record.answers
    assert one.seconds_per_token is None
    assert three.seconds_per_token is not None
    assert three.first_s is not None
    assert three.last_s is not None
    assert three.seconds_per_token == pytest.approx((three.last_s - three.first_s) / 2)


def lora_info(sequences: SequenceCounts, *models: ServedModel) -> tuple[str, str]:
    [(labels, _)] = Scrape(replica(sequences, models).render().decode()).series("vllm:lora_requests_info")
    return labels["running_lora_adapters"], labels["waiting_lora_adapters"]


def test_a_merged_adapter_has_its_name() -> None:
    """A merged adapter has its name in the metrics."""
    merged = ServedModel("only", digest="ab" * 32)
    assert lora_info(SequenceCounts({"only": 2}, {}), merged) == ("only", "")
    metrics = Scrape(replica(SequenceCounts({"only": 2}, {}), (merged,)).render().decode())
    assert metrics.series("loramux_sequences_running") == [({"model": "only"}, 2)]


@pytest.fixture
def _restored() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.configure(**before)


def logged(capsys: pytest.CaptureFixture[str], form: Any) -> str:
    log_to_stderr(form)
    with bound_contextvars(request_id="r1"):
        structlog.get_logger().info("said", number=3)
    return capsys.readouterr().err


@pytest.mark.usefixtures("_restored")
def test_the_log_is_json_or_text(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON where stderr is no terminal and where that is set, text where that is set; both with the context."""
    for form in ("auto", "json"):
        line = json.loads(logged(capsys, form))
        assert (line["event"], line["number"], line["request_id"], line["level"]) == ("said", 3, "r1", "info")
    text = logged(capsys, "text")
    assert "number=3 request_id=r1" in text
    assert "\x1b" not in text


def test_texts_of_requests_with_one_id_are_apart() -> None:
    """Two requests at the same time may bring the same id; each line has its own texts."""
    watcher = RequestLog(texts=True)
    with capture_logs() as lines, ExitStack() as both:
        for prompt in ("x", "y"):
            follower = both.enter_context(following(Request.of("m", prompt, id="same"), [watcher]))
            submit(follower)
            follower.see(AnswerDelta(prompt.upper(), (Token(5),)))
            follower.see(DONE)
    assert [(line["prompt"], line["answers"]) for line in lines] == [("y", ["Y"]), ("x", ["X"])]
