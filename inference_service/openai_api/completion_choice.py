"""One of the answers to a plain prompt: whole, or in chunks."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from inference_service.core.sequence import Token
from inference_service.openai_api.logprobs import legacy_logprobs
from inference_service.openai_api.reply import REASONS, Json, ended_by
from inference_service.serving.request import Delta, Finished
from inference_service.serving.text import Text


class CompletionChoice:
    """Collects the text of an answer, or tells it in chunks."""

    def __init__(self, index: int, stops: Collection[str], text: Text | None) -> None:
        """Begin an answer that stops may end; text is given where log probabilities are to be told."""
        self._index = index
        self._stops = stops
        self._text = text
        self._said: list[str] = []
        self._tokens: list[Token] = []
        self._offset = 0
        """Characters of the tokens that were told in chunks."""
        self._reason: str | None = None
        self._ended_by: str | int | None = None
        self._more: Json = {}

    def echo(self, prompt: str, tokens: Sequence[Token]) -> list[Json]:
        """Put the prompt before the answer; return the choice that tells it."""
        self._said.append(prompt)
        self._tokens += tokens
        return [self._choice(prompt, tokens)]

    def score(self, more: Json) -> None:
        """Add what is known of the prompt's tokens."""
        self._more = more

    def take(self, delta: Delta) -> list[Json]:
        """Read more of the answer; return the choices that tell it."""
        self._said.append(delta.text)
        self._tokens += delta.tokens
        return [self._choice(delta.text, delta.tokens)] if delta.text or self._text is not None else []

    def end(self, finished: Finished) -> list[Json]:
        """Read the end of the answer; return the choices that tell it."""
        self._reason = REASONS[finished.reason]
        self._ended_by = ended_by(finished, self._stops)
        return [self._choice("", ())]

    def whole(self) -> Json:
        """Return the choice of an answer that is complete."""
        self._offset = 0
        return self._choice("".join(self._said), self._tokens)

    def _choice(self, said: str, tokens: Sequence[Token]) -> Json:
        scores = None
        if self._text is not None and tokens:
            scores = legacy_logprobs(tokens, self._text, self._offset)
            self._offset += sum(len(self._text.token_text(token.id)) for token in tokens)
        ended = {"finish_reason": self._reason, "stop_reason": self._ended_by}
        return {"index": self._index, "text": said, "logprobs": scores} | ended | self._more
