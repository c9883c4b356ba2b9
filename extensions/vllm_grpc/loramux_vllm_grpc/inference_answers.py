"""The map from events to messages of ``vllm.Inference``."""

from collections.abc import Collection, Iterator, Sequence
from typing import Final

from inference_service.core.sequence import EndReason, Token
from inference_service.serving.request import (
    AnswerDelta,
    AnswerFinished,
    AnswerStarted,
    Event,
    PromptScores,
    Request,
)
from loramux_vllm_grpc.logprobs import check_fits
from loramux_vllm_grpc.wire import inference_pb2 as pb

REASONS: Final = {EndReason.STOP: pb.FinishInfo.STOP, EndReason.LENGTH: pb.FinishInfo.LENGTH}


class Telling:
    """Tells one request as it goes: the prompt once, then outputs; the last of an answer says how it ended."""

    def __init__(self, request: Request, options: pb.ResponseOptions) -> None:
        """Tell what options ask for."""
        self._options = options
        self._text = not options.HasField("output_text") or options.output_text
        self._scores_prompt = request.sampling.prompt_logprobs is not None
        self.ends: Collection[int] = ()
        """Tokens that end a text."""
        self._started: AnswerStarted | None = None
        self._n = request.output.n
        self._counts = {0: 0}
        """Tokens of the answers that are not complete; before the request is accepted, n is only a number."""
        self._last = -1

    def messages(self, event: Event) -> Iterator[pb.GenerateResponse]:
        """Return what an event says.

        Raises:
            RequestInvalid: more log probabilities than a message holds.
        """
        match event:
            case AnswerStarted():
                self._started = event
                self._counts = dict.fromkeys(range(self._n), 0)
                if not self._scores_prompt:
                    yield pb.GenerateResponse(prompt_info=self._prompt(event))
            case PromptScores():
                check_fits(event.tokens, "response.prompt_logprobs")
                assert self._started is not None  # noqa: S101 - it comes first
                yield pb.GenerateResponse(prompt_info=self._prompt(self._started, event.tokens))
            case AnswerDelta():
                self._counts[event.index] += len(event.tokens)
                self._last = event.tokens[-1].id
                yield pb.GenerateResponse(outputs=self._output(event))
            case AnswerFinished():
                finish = self._finish(event)
                yield pb.GenerateResponse(outputs=pb.SequenceOutput(index=event.index, finish_info=finish))

    def aborted(self) -> Iterator[pb.GenerateResponse]:
        """Return what ends the answers that are not complete."""
        for index, count in sorted(self._counts.items()):
            finish = pb.FinishInfo(num_output_tokens=count, finish_reason=pb.FinishInfo.ABORTED)
            yield pb.GenerateResponse(outputs=pb.SequenceOutput(index=index, finish_info=finish))

    def _prompt(self, started: AnswerStarted, tokens: Sequence[Token] = ()) -> pb.PromptInfo:
        return pb.PromptInfo(
            num_prompt_tokens=started.prompt_tokens,
            token_ids=started.prompt_token_ids if self._options.prompt_token_ids else (),
            logprobs=[token.logprob or 0.0 for token in tokens],
            ranks=[token.rank or 0 for token in tokens],
            candidate_tokens=map(_candidates, tokens),
        )

    def _output(self, delta: AnswerDelta) -> pb.SequenceOutput:
        scored = delta.tokens if self._options.output_logprobs else ()
        return pb.SequenceOutput(
            index=delta.index,
            text=delta.text if self._text else "",
            num_tokens=len(delta.tokens),
            token_ids=[token.id for token in delta.tokens] if self._options.output_token_ids else (),
            logprobs=[token.logprob or 0.0 for token in scored],
            ranks=[token.rank or 0 for token in scored],
            candidate_tokens=map(_candidates, scored),
        )

    def _finish(self, event: AnswerFinished) -> pb.FinishInfo:
        del self._counts[event.index]
        finish = pb.FinishInfo(
            num_output_tokens=event.completion_tokens,
            finish_reason=REASONS[event.reason],
            num_cached_tokens=event.cached_tokens,
        )
        if event.reason is EndReason.STOP:
            if event.stop_text:
                finish.stop_string = event.stop_text
            elif event.stop_token_id is not None:
                finish.stop_token_id = event.stop_token_id
            elif self._last in self.ends:
                finish.eos_token_id = self._last
        return finish


def whole(messages: Sequence[pb.GenerateResponse]) -> pb.GenerateResponse:
    """Return the messages of one answer as one: lists and texts joined, the last end."""
    joined = pb.GenerateResponse()
    for message in messages:
        count = joined.outputs.num_tokens + message.outputs.num_tokens
        text = joined.outputs.text + message.outputs.text
        joined.MergeFrom(message)
        joined.outputs.num_tokens = count
        joined.outputs.text = text
    return joined


def _candidates(token: Token) -> pb.CandidateTokenInfo:
    """Return the most likely tokens of a place but the one that is there."""
    return pb.CandidateTokenInfo(
        tokens=[
            pb.CandidateTokenInfo.TokenInfo(id=other, logprob=logprob, rank=rank)
            for rank, (other, logprob) in enumerate(token.top, 1)
            if other != token.id
        ]
    )
