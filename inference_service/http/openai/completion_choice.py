"""One of the answers to a plain prompt: whole, or in chunks."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from inference_service.core.sequence import Token
from inference_service.http.openai.logprobs import Names, legacy_logprobs
from inference_service.http.wire.reply import REASONS, Json, ended_by
from inference_service.serving.request import Delta, Finished


class CompletionChoice:
    """Collects the text of an answer, or tells it in chunks."""

    def __init__(self, index: int, stops: Collection[str], names: Names | None, *, ids: bool) -> None:
        """Begin an answer that stops may end.

        Names are given where log probabilities are asked for, ids where token ids are.
        """
        self._index = index
        self._stops = stops
        self._ids: list[int] | None = [] if ids else None
        self._names = names
        self._said: list[str] = []
        self._tokens: list[Token] = []
        self._offset = 0
        """Characters of the tokens that were told in chunks."""
        self._reason: str | None = None
        self._ended_by: str | int | None = None
        self._prompt: Json = {}
        self._untold: Json = {}
        """Of the prompt, what was not told in a chunk yet."""

    def echo(self, prompt: str, tokens: Sequence[Token]) -> list[Json]:
        """Put the prompt before the answer; return the choice that tells it."""
        self._said.append(prompt)
        self._tokens += tokens
        return [self._chunk(prompt, tokens)]

    def know(self, prompt: Json) -> None:
        """Add what is to be told of the prompt, once: its tokens, or their scores."""
        self._prompt |= prompt
        self._untold |= prompt

    def take(self, delta: Delta) -> list[Json]:
        """Read more of the answer; return the choices that tell it."""
        self._said.append(delta.text)
        self._tokens += delta.tokens
        ids = [token.id for token in delta.tokens]
        if self._ids is not None:
            self._ids += ids
        told = delta.text or self._names is not None or self._ids is not None
        return [self._chunk(delta.text, delta.tokens, ids)] if told else []

    def end(self, finished: Finished) -> list[Json]:
        """Read the end of the answer; return the choices that tell it."""
        self._reason = REASONS[finished.reason]
        self._ended_by = ended_by(finished, self._stops)
        return [self._chunk("", ())]

    def whole(self) -> Json:
        """Return the choice of an answer that is complete."""
        self._offset = 0
        return self._choice("".join(self._said), self._tokens, self._ids or ()) | self._prompt

    def _chunk(self, said: str, tokens: Sequence[Token], ids: Sequence[int] = ()) -> Json:
        prompt, self._untold = self._untold, {}
        return self._choice(said, tokens, ids) | prompt

    def _choice(self, said: str, tokens: Sequence[Token], ids: Sequence[int]) -> Json:
        scores = None
        if self._names is not None and tokens:
            scores = legacy_logprobs(tokens, self._names, self._offset)
            self._offset += sum(len(self._names.text.token_text(token.id)) for token in tokens)
        choice = {"index": self._index, "text": said, "logprobs": scores, "finish_reason": self._reason}
        choice["stop_reason"] = self._ended_by
        return choice if self._ids is None else choice | {"token_ids": list(ids)}
