"""One answer of a request: from tokens to text."""

from collections.abc import Collection, Sequence as Seq

from inference_service.core.request import AnswerDelta, AnswerFinished, Event, Pooled, PromptScores, TokenUsage
from inference_service.core.sequence import EndReason, StepOutput, Token
from inference_service.driver.delivery import AnswerView
from inference_service.driver.port import Submission
from inference_service.text.text import Detokenizer, StopTexts
from loramux_shared.faults import DeadlineExceeded, Fault, Finding, InternalFault, RequestInvalid


class Answer:
    """Turns the outputs of a sequence into events; a stop token has no text, unless stops are kept."""

    def __init__(
        self,
        index: int,
        submission: Submission,
        view: AnswerView,
        detokenizer: Detokenizer,
        stops: StopTexts,
        stop_tokens: Collection[int] = (),
        constraint: str = "",
    ) -> None:
        """Begin an answer.

        stop_tokens are those of its stop tokens that are emitted when they end it; constraint is the field that
        asks for one.
        """
        self.finished = False
        self._index = index
        self._submission = submission
        self._view = view
        self._detokenizer = detokenizer
        self._stops = stops
        self._stop_tokens = stop_tokens
        self._constraint = constraint
        self._count = 0

    def advance(self, outputs: Seq[StepOutput]) -> list[Event]:
        """Return what the next outputs say; nothing once the answer is finished.

        Raises:
            DeadlineExceeded: the sequence ended so.
            RequestInvalid: its constraint became too complex to follow, or no token may come next.
            Fault: why its adapter could not be loaded.
            InternalFault: the step that it was part of failed.
        """
        if self.finished or not outputs:
            return []
        events: list[Event] = []
        if outputs[0].prompt:
            events.append(PromptScores(outputs[0].prompt))
        if (vector := outputs[-1].pooled) is not None:
            events.append(Pooled(vector))
        delta, reason = self._read(outputs)
        if delta.tokens:
            events.append(delta)
        if reason is not None:
            self.finished = True
            events.append(self._finished(reason, outputs[-1].token))
        return events

    def more(self, outputs: Seq[StepOutput]) -> AnswerDelta:
        """Return what outputs say that have tokens and no end, of an answer without stop texts."""
        return self._read(outputs)[0]

    def _read(self, outputs: Seq[StepOutput]) -> tuple[AnswerDelta, EndReason | None]:
        """Read up to a stop text; without stop texts, all tokens are decoded together."""
        last = outputs[-1]
        failed = last.finish in (EndReason.FAILED, EndReason.DEADLINE)
        tokens = [output.token for output in (outputs[:-1] if failed else outputs) if output.token is not None]
        ids = [token.id for token in tokens]
        if ids and not self._stops.keep and ids[-1] in self._submission.sampling.stop_token_ids:
            ids.pop()
        if self._stops.texts:
            text = ""
            for count, token_id in enumerate(ids, 1):
                text += self._stops.push(self._detokenizer.push((token_id,)))
                if self._stops.found is not None:
                    return self._delta(text, tokens[:count]), EndReason.STOP
        else:
            text = self._detokenizer.push(ids)
        if failed:
            raise self._failure(last, self._count + len(tokens))
        return self._delta(text + (self._stops.flush() if last.finish else ""), tokens), last.finish

    def _delta(self, text: str, tokens: Seq[Token]) -> AnswerDelta:
        self._count += len(tokens)
        return AnswerDelta(text, tuple(tokens), self._index)

    def _finished(self, reason: EndReason, last: Token | None) -> AnswerFinished:
        text, token = self._stops.found, last.id if last else None
        stopped_by = token if text is None and token in self._stop_tokens else None
        usage = TokenUsage(len(self._submission.prompt), self._view.num_cached, self._count)
        return AnswerFinished(reason, text or "", usage, self._index, stopped_by)

    def _failure(self, output: StepOutput, num_tokens: int) -> Fault:
        if output.finish is EndReason.DEADLINE:
            return DeadlineExceeded("the deadline passed before the answer was complete; it was ended.")
        if output.fault is not None:
            return output.fault.with_message(f"model {self._submission.model.name!r}: {output.fault.message}")
        if self._view.failure:
            finding = Finding(
                code="E_CONSTRAINT",
                where=self._constraint,
                expected="a constraint that the answer can follow to its end",
                found=self._view.failure,
                fix="Simplify it.",
            )
            return RequestInvalid("the answer cannot be constrained any further.", [finding])
        if output.token is not None and output.token.impossible:
            return self._dead_end(num_tokens)
        return InternalFault("the engine failed; the server's log has the details. Please report it.")

    def _dead_end(self, num_tokens: int) -> RequestInvalid:
        bounded = self._submission.sampling.allowed_token_ids is not None
        return RequestInvalid.of_field(
            "no token is allowed next in the answer.",
            "allowed_token_ids" if bounded else "bad_words",
            "a token that allowed_token_ids, bad_words and the constraint allow",
            f"none after {num_tokens} tokens of the answer",
            "Allow more tokens, or forbid fewer words.",
        )
