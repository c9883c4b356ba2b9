"""Log probabilities in the shapes of chat, of plain completions, and of vLLM's `prompt_logprobs`."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from inference_service.api.http.openai.answers import (
    ChatLogprobs,
    PlainLogprobs,
    PromptLogprobs,
    RankedToken,
    TokenLogprob,
    TopLogprob,
)
from inference_service.core.sequence import Token
from inference_service.text.text import Text

IMPOSSIBLE = -9999.0
"""The API's number for minus infinity, which JSON does not know."""


@dataclass(frozen=True)
class TokenNames:
    """The names of tokens in log probabilities."""

    text: Text
    as_ids: bool = False
    """vLLM's ``return_tokens_as_token_ids``: ``token_id:5`` for a text, which several tokens may have."""

    def of_chat(self, token: int) -> str:
        """Return a token's name in a chat."""
        return f"token_id:{token}" if self.as_ids else self.text.token_text(token)

    def of_completion(self, token: int) -> str:
        """Return a token's name in a plain completion."""
        return f"token_id:{token}" if self.as_ids else legacy_name(token, self.text)


def chat_logprobs(tokens: Sequence[Token], names: TokenNames) -> ChatLogprobs:
    """Return the ``logprobs`` of a chat's choice."""
    return {"content": [_chat_token(token, names) for token in tokens], "refusal": None}


def _chat_token(token: Token, names: TokenNames) -> TokenLogprob:
    top = [_top_token(number, logprob, names) for number, logprob in token.top]
    return {**_top_token(token.id, token.logprob, names), "top_logprobs": top}


def _top_token(token: int, logprob: float | None, names: TokenNames) -> TopLogprob:
    return {
        "token": names.of_chat(token),
        "logprob": None if logprob is None else _finite(logprob),
        "bytes": list(names.text.token_bytes(token)),
    }


def legacy_logprobs(tokens: Sequence[Token], names: TokenNames, offset: int) -> PlainLogprobs:
    """Return the ``logprobs`` of a plain completion's choice; offset is where its text begins in the answer."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(names.text.token_text(token.id))
    return {
        "tokens": [names.of_completion(token.id) for token in tokens],
        "token_logprobs": [None if token.logprob is None else _finite(token.logprob) for token in tokens],
        "top_logprobs": [_legacy_top(token, names) for token in tokens],
        "text_offset": offsets,
    }


def _legacy_top(token: Token, names: TokenNames) -> dict[str, float] | None:
    """Return the most likely tokens by their names, the chosen one among them."""
    if token.logprob is None:
        return None
    top = {names.of_completion(number): _finite(logprob) for number, logprob in token.top}
    return top | {names.of_completion(token.id): _finite(token.logprob)}


def legacy_name(token: int, text: Text) -> str:
    """Return a token by its text, or like ``bytes:\\\\xe2`` where it is a part of a character."""
    raw = text.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def prompt_logprobs(tokens: Iterable[Token], text: Text) -> PromptLogprobs:
    """Return vLLM's ``prompt_logprobs``: by token id; tokens that tie share the best rank of them."""
    return [_ranked(token, text) for token in tokens]


def _ranked(token: Token, text: Text) -> dict[str, RankedToken] | None:
    if token.logprob is None:
        return None
    ranked = {str(token.id): _decoded(token.id, token.logprob, token.rank, text)}
    scores = [logprob for _, logprob in token.top]
    for number, logprob in token.top:
        ranked[str(number)] = _decoded(number, logprob, 1 + scores.index(logprob), text)
    return ranked


def _decoded(token: int, logprob: float, rank: int | None, text: Text) -> RankedToken:
    return {"logprob": _finite(logprob), "rank": rank, "decoded_token": text.token_text(token)}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else IMPOSSIBLE
