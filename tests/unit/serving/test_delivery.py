"""The delivery of outputs to their streams, and answers made of outputs that come together."""

import asyncio
from collections.abc import Mapping, Sequence as Seq

import pytest
from tokenizers import Tokenizer, decoders, models

from inference_service.api.processes.messages import AnswerState
from inference_service.api.requests.answer import Answer
from inference_service.core.request import AnswerDelta, AnswerFinished, Event
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import EndReason, StepOutput, Token
from inference_service.core.served_model import ServedModel
from inference_service.driver.delivery import SLICE, Delivery, Outputs
from inference_service.driver.port import Submission
from inference_service.text.text import StopTexts, Text
from loramux_shared.faults import InternalFault, ReplicaFailed
from tests.unit.serving.threads import following


def _stream(name: int) -> Outputs:
    stream = Outputs({str(name): AnswerState()}, lambda _: None)
    stream.put(str(name), [StepOutput(str(name), Token(7), None)])
    return stream


async def test_what_comes_while_a_stream_waits_is_one_message() -> None:
    """Outputs of a waiting stream are delivered together; first and last tokens come first."""
    delivery, stream = Delivery(), _stream(0)
    delivery.add(stream, urgent=False)
    stream.put("0", [StepOutput("0", Token(8), None)])
    delivery.add(stream, urgent=False)
    delivery.begin()
    assert [output.token for output in await following(stream)] == [Token(7), Token(8)]
    stream.put("0", [StepOutput("0", Token(9), EndReason.LENGTH)])
    delivery.add(stream, urgent=True)
    others = [_stream(number) for number in range(SLICE)]
    readers = [asyncio.create_task(other.get()) for other in others]
    await asyncio.sleep(0)
    for other in others:
        delivery.add(other, urgent=True)
    delivery.begin()
    for _ in range(2):  # in one turn the streams are woken, in the next one their readers
        await asyncio.sleep(0)
    assert all(reader.done() for reader in readers), "first and last tokens wait for no rest"
    assert [output.token for output in await following(stream)] == [Token(9)]


@pytest.mark.parametrize("takes", [True, False, ReplicaFailed("the sink broke")])
async def test_a_sink_takes_what_comes_while_the_reader_waits(takes: bool | ReplicaFailed) -> None:
    """Outputs go to the sink; those that it leaves, and its failure, go to the reader."""
    stream, seen = _stream(1), []

    def sink(arrived: Mapping[str, list[StepOutput]]) -> bool:
        seen.extend(arrived["1"])
        if isinstance(takes, ReplicaFailed):
            raise takes
        return takes

    stream.divert(sink)
    stream.wake()
    assert not seen  # the reader is not there yet
    first = await stream.get()
    reader = asyncio.ensure_future(stream.get())
    await asyncio.sleep(0)
    stream.put("1", first["1"])
    stream.wake()
    await asyncio.sleep(0)
    assert seen == first["1"]
    assert reader.done() is (takes is not True)
    reader.cancel()
    [found] = await asyncio.gather(reader, return_exceptions=True)
    assert found == first or isinstance(found, asyncio.CancelledError if takes is True else ReplicaFailed)
    assert (found == first) is (takes is False)


WORDS = ("a", "b", "c", "d", "</s>")
END = WORDS.index("</s>")


def _answer(stops: Seq[str] = (), *, keep: bool = False) -> Answer:
    tokenizer = Tokenizer(models.WordLevel(dict(zip(WORDS, range(len(WORDS)), strict=True)), unk_token="a"))  # noqa: S106 - a word
    tokenizer.decoder = decoders.Fuse()
    text = Text(tokenizer, None, len(WORDS))
    sampling = SamplingParams(max_tokens=9, stop_token_ids=frozenset({END}))
    submission = Submission(ServedModel("base"), [0], sampling)
    return Answer(0, submission, AnswerState(), text.detokenizer([0]), StopTexts(stops, keep=keep))


def _outputs(tokens: Seq[int], finish: EndReason | None = None) -> list[StepOutput]:
    outputs = [StepOutput("0", Token(token)) for token in tokens]
    outputs[-1].finish = finish
    return outputs


def _reported(events: Seq[Event]) -> tuple[str, list[int], EndReason | None]:
    """Return the text of events, the ids of their tokens, and how they end."""
    deltas = [event for event in events if isinstance(event, AnswerDelta)]
    ends = [event.reason for event in events if isinstance(event, AnswerFinished)]
    ids = [token.id for delta in deltas for token in delta.tokens]
    return "".join(delta.text for delta in deltas), ids, ends[0] if ends else None


@pytest.mark.parametrize(
    ("stops", "keep", "expected"),
    [
        ((), False, ("abc", [0, 1, 2, END], EndReason.STOP)),
        ((), True, ("abc</s>", [0, 1, 2, END], EndReason.STOP)),
        (("x",), False, ("abc", [0, 1, 2, END], EndReason.STOP)),
        (("b",), False, ("a", [0, 1], EndReason.STOP)),
        (("ab",), True, ("ab", [0, 1], EndReason.STOP)),
    ],
)
@pytest.mark.parametrize("together", [1, 2, 4])
def test_how_many_tokens_come_together_changes_nothing(stops, keep, expected, together) -> None:
    """The text, the tokens and the end of an answer do not depend on how outputs are divided."""
    answer, outputs = _answer(stops, keep=keep), _outputs([0, 1, 2, END], EndReason.STOP)
    batches = [outputs[start : start + together] for start in range(0, len(outputs), together)]
    assert _reported([event for each in batches for event in answer.advance(each)]) == expected


def test_a_stop_text_ends_an_answer_before_the_failure_behind_it() -> None:
    """A failure behind a stop text does not fail the answer."""
    outputs = [*_outputs([0, 1]), StepOutput("0", None, EndReason.FAILED)]
    assert _reported(_answer(["b"]).advance(outputs)) == ("a", [0, 1], EndReason.STOP)
    with pytest.raises(InternalFault):
        _answer(["c"]).advance(outputs)
