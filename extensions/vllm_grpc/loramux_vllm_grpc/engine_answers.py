"""The map from events to messages of ``vllm.grpc.engine``."""

from collections.abc import Iterator, Sequence
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
from loramux_vllm_grpc.wire import engine_pb2 as pb

REASONS: Final = {EndReason.STOP: "stop", EndReason.LENGTH: "length"}
ABORTED: Final = "abort"


class Telling:
    """Tells one request: in chunks and a last message for each answer, or in the last messages alone."""

    def __init__(self, request: Request, *, stream: bool) -> None:
        self._stream = stream
        self._prompt_tokens = 0
        self._prompt: tuple[Token, ...] = ()
        self._n = request.output.n
        self._tokens: dict[int, list[Token]] = {0: []}
        """Tokens of the answers that are not complete; before the request is accepted, n is only a number."""

    def messages(self, event: Event) -> Iterator[pb.GenerateResponse]:
        """Return what an event says.

        Raises:
            RequestInvalid: more log probabilities than a message holds.
        """
        match event:
            case AnswerStarted():
                self._prompt_tokens = event.prompt_tokens
                self._tokens = {index: [] for index in range(self._n)}
            case PromptScores():
                check_fits(event.tokens, "prompt_logprobs")
                self._prompt = event.tokens
            case AnswerDelta():
                self._tokens[event.index] += event.tokens
                if self._stream:
                    yield pb.GenerateResponse(chunk=self._chunk(event))
            case AnswerFinished():
                yield pb.GenerateResponse(complete=self._complete(event.index, REASONS[event.reason], event))

    def aborted(self) -> Iterator[pb.GenerateResponse]:
        """Return what ends the answers that are not complete."""
        for index in sorted(self._tokens):
            yield pb.GenerateResponse(complete=self._complete(index, ABORTED))

    def _chunk(self, delta: AnswerDelta) -> pb.GenerateStreamChunk:
        return pb.GenerateStreamChunk(
            token_ids=[token.id for token in delta.tokens],
            prompt_tokens=self._prompt_tokens,
            completion_tokens=len(delta.tokens),
            output_logprobs=_output_logprobs(delta.tokens),
            input_logprobs=self._input_logprobs(delta.index),
            index=delta.index,
        )

    def _complete(self, index: int, reason: str, finished: AnswerFinished | None = None) -> pb.GenerateComplete:
        tokens = self._tokens.pop(index)
        if not self._stream:
            check_fits(tokens, "logprobs")
        complete = pb.GenerateComplete(
            output_ids=[token.id for token in tokens],
            finish_reason=reason,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=len(tokens),
            cached_tokens=finished.cached_tokens if finished else 0,
            output_logprobs=None if self._stream else _output_logprobs(tokens),
            input_logprobs=self._input_logprobs(index),
            index=index,
        )
        if finished and finished.stop_text:
            complete.matched_stop_str = finished.stop_text
        elif finished and finished.stop_token_id is not None:
            complete.matched_token_id = finished.stop_token_id
        return complete

    def _input_logprobs(self, index: int) -> pb.InputLogProbs | None:
        """Return those of the prompt, once, with the first answer."""
        if index or not self._prompt:
            return None
        tokens, self._prompt = self._prompt, ()
        return pb.InputLogProbs(
            token_logprobs=[pb.InputTokenLogProb(value=token.logprob) for token in tokens],
            token_ids=[token.id for token in tokens],
            top_logprobs=_alternatives(tokens),
        )


def _output_logprobs(tokens: Sequence[Token]) -> pb.OutputLogProbs | None:
    if not tokens or tokens[0].logprob is None:
        return None
    return pb.OutputLogProbs(
        token_logprobs=[token.logprob for token in tokens if token.logprob is not None],
        token_ids=[token.id for token in tokens],
        top_logprobs=_alternatives(tokens),
    )


def _alternatives(tokens: Sequence[Token]) -> list[pb.TopLogProbs]:
    """Return the most likely tokens of each place; of none where none were asked for."""
    if not any(token.top for token in tokens):
        return []
    return [
        pb.TopLogProbs(values=[value for _, value in token.top], token_ids=[other for other, _ in token.top])
        for token in tokens
    ]
