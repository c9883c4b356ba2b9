"""The terms of a request on its model: tokens of its prompt, and the sampling of its answers."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Final, NamedTuple, TypeVar

import numpy as np

from inference_service.api.requests.bounds import check_constraint, countable, prompt_too_long, refused
from inference_service.core.constraint import Constraint, packed
from inference_service.core.request import Request, TextPair
from inference_service.core.sampling import LogprobsMode, SamplingParams
from inference_service.core.sequence import NEVER
from inference_service.core.served_model import AdapterDefaults, ServedModel
from inference_service.driver.port import Submission
from inference_service.text.text import Text
from loramux_shared.faults import PromptTooLong, RequestInvalid

TAKEN: Final = tuple(each.name for each in fields(SamplingParams))
"""Knobs of a sequence, each that of its request unless `Terms.sampling` makes another of it."""


@dataclass(frozen=True)
class ServingLimits:
    """Bounds of a request."""

    max_seq_len: int
    """Tokens of prompt and answer together."""
    eos_token_ids: frozenset[int]
    hidden_size: int = 0
    """Numbers of a vector."""
    encodes: bool = False
    """True if the base is an encoder, which makes vectors alone."""
    token_types: int = 0
    """Types by which an encoder tells the texts of a pair apart; 0: by none."""
    generates: bool = True
    """False for a base that makes vectors and scores alone."""
    sparse: bool = False
    """True for one that makes sparse vectors, too."""


class PromptTokens(NamedTuple):
    """A prompt as the model reads it."""

    ids: list[int]
    second: int = NEVER
    """Position of the first token of a pair's second text, where the tokenizer tells them apart."""

    def last(self, count: int) -> PromptTokens:
        """Return the last tokens."""
        cut = max(0, len(self.ids) - count)
        return PromptTokens(self.ids[cut:], max(0, self.second - cut))


@dataclass(frozen=True)
class Terms:
    """A request beside its model."""

    request: Request
    defaults: AdapterDefaults
    """Defaults of the model."""
    text: Text
    """Tokenizer of the model."""
    limits: ServingLimits
    default_max_tokens: int | None
    """New tokens of a request that sets no limit; None: as many as fit."""
    logprobs_mode: LogprobsMode = "raw"
    """Mode where the request names none."""

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer by themselves."""
        ends = self.limits.eos_token_ids | self.defaults.stop_token_ids
        return frozenset() if self.request.sampling.ignore_eos else ends

    async def prompt(self, most: int) -> PromptTokens:
        """Return the tokens of the prompt, of which a text may have so many unless it is cut. Raise
        PromptTooLong for more, and RequestInvalid for none, or where the template refuses its messages.
        """
        source = self.request.prompt
        prompt, cut, side = source.content, source.truncate_prompt_tokens, source.truncation_side
        if isinstance(prompt, TextPair) and self.text.pairs.instruction is not None:
            longest = most if cut is None else countable(most)
            if cut is not None and side == "left":
                raise refused("truncation_side", "right: the end of a document is left out", "left")
            return PromptTokens(
                await self.text.encode_rendered_pair(
                    prompt, longest, self.defaults.template, most if cut == -1 else cut
                )
            )
        if cut is not None and (side or self.limits.encodes) and isinstance(prompt, str | TextPair):
            texts = (prompt,) if isinstance(prompt, str) else prompt
            found = await asyncio.to_thread(self._cut, texts, most if cut == -1 else cut)
            cut = None
        else:
            found = await self._tokens(most if cut is None else countable(most))
        if not found.ids:
            raise RequestInvalid.of_field("the prompt is empty.", "prompt", "at least one token", "none")
        if cut == -1:
            cut = self._longest_prompt()
        if cut is None or cut < 1:
            return found
        return PromptTokens(found.ids[:cut]) if side == "right" else found.last(cut)

    async def _tokens(self, most: int) -> PromptTokens:
        """Return the tokens of the whole prompt: of a pair, a text, messages, or tokens as they are."""
        source, text = self.request.prompt, self.text
        prompt, special = source.content, source.add_special_tokens is not False
        if isinstance(prompt, TextPair):
            tokens, types = await asyncio.to_thread(text.encode_pair, prompt, most, add_special_tokens=special)
            return PromptTokens(tokens, types.index(1) if 1 in types else NEVER)
        if isinstance(prompt, str):
            return PromptTokens(await text.encoded(prompt, most, add_special_tokens=special))
        if prompt and isinstance(prompt[0], Mapping):
            return PromptTokens(
                await text.encode_messages(
                    [item for item in prompt if isinstance(item, Mapping)],
                    most,
                    self.defaults.template,
                    source.tools,
                    source.chat_template_kwargs,
                    add_generation_prompt=source.add_generation_prompt,
                    add_special_tokens=bool(source.add_special_tokens),
                    continue_final_message=source.continue_final_message,
                )
            )
        return PromptTokens([item for item in prompt if isinstance(item, int)])

    def _longest_prompt(self) -> int:
        """Return the tokens of a prompt that leaves room for the answer."""
        longest, most_new = self.limits.max_seq_len, self.request.sampling.max_tokens
        usual = min(self.default_max_tokens or 1, longest - 1)
        return longest - (usual if most_new is None else most_new)

    def check_rows(self, tokens: list[int], second: int) -> None:
        """Raise RequestInvalid for tokens, or types of tokens, that the model's tables have no rows for: its
        tokenizer may know others, which no step could compute.
        """
        vocab, types = self.text.vocab, self.limits.token_types
        if (largest := max(tokens)) >= vocab:
            problem = "the tokenizer of the model makes tokens that the model does not have."
            raise RequestInvalid.of_field(problem, "prompt", f"tokens from 0 to {vocab - 1}", str(largest))
        if types == 1 and second < len(tokens):
            problem = "the tokenizer of the model tells the texts of a pair apart, and the model does not."
            raise RequestInvalid.of_field(
                problem, "prompt", "one text: type_vocab_size of the base is 1", "two"
            )

    def _cut(self, texts: tuple[str, ...], most: int) -> PromptTokens:
        """Return texts as a model was trained on them where they are too long: without their ends."""
        source = self.request.prompt
        special, side = source.add_special_tokens is not False, source.truncation_side or "right"
        longest = countable(self.limits.max_seq_len)
        tokens, types = self.text.encode_shortened(texts, longest, most, side, add_special_tokens=special)
        return PromptTokens(tokens, types.index(1) if 1 in types else NEVER)

    async def submission(self, model: ServedModel, tokens: list[int], second: int) -> Submission:
        """Return what the engine needs for answers to a prompt.

        Raises:
            PromptTooLong: both do not fit.
            RequestInvalid: the constraint is too long, and is not optional.
        """
        output, scheduling = self.request.output, self.request.scheduling
        return Submission(
            model,
            tokens,
            await self.sampling(len(tokens)),
            output.n,
            self._constraint(),
            self.ends_of_text if output.constraint else frozenset(),
            output.pooling,
            second,
            scheduling.priority,
            scheduling.deadline_s,
            scheduling.cache_salt or "",
        )

    def _constraint(self) -> Constraint | None:
        """Return the constraint; None also for one that is too long and may be left out."""
        constraint = self.request.output.constraint
        try:
            check_constraint(constraint)
        except RequestInvalid:
            if constraint is None or not constraint.optional:
                raise
            return None
        return constraint

    async def sampling(self, prompt_tokens: int) -> SamplingParams:
        """Return what the answers to so many tokens are drawn by; raise PromptTooLong where both do not fit."""
        requested, defaults = self.request.sampling, self.defaults
        fits = room(requested.max_tokens, prompt_tokens, self.limits.max_seq_len)
        most = min(self.default_max_tokens or fits, fits)
        bad_words: Mapping[int, Mapping[tuple[int, ...], tuple[int, ...]]] = {}
        if requested.bad_words or requested.bad_words_token_ids:
            words = await asyncio.to_thread(self.text.bad_words, requested.bad_words)
            bad_words = completing((*words, *requested.bad_words_token_ids))
        made = {
            "max_tokens": most if requested.max_tokens is None else requested.max_tokens,
            "temperature": drawable(
                first(requested.temperature, defaults.temperature, requested.usual_temperature)
            ),
            "top_p": drawable(first(requested.top_p, defaults.top_p, 1.0)),
            "top_k": min(max(0, first(requested.top_k, defaults.top_k, 0)), self.text.vocab),
            "seed": secrets.randbits(63) if requested.seed is None else requested.seed,
            "stop_token_ids": self.ends | frozenset(requested.stop_token_ids),
            "allowed_token_ids": self._allowed(),
            "bad_words": bad_words,
            "logprobs_mode": requested.logprobs_mode or self.logprobs_mode,
        }
        return SamplingParams(**{name: getattr(requested, name) for name in TAKEN} | made)

    def _allowed(self) -> bytes | None:
        """Return the mask of the tokens that a request allows; the end of a text is left to its constraint."""
        request = self.request
        if request.sampling.allowed_token_ids is None:
            return None
        ends = self.ends_of_text if request.output.constraint else frozenset()
        allowed = np.zeros(self.text.vocab, np.bool_)
        allowed[[*request.sampling.allowed_token_ids, *ends]] = True
        return packed(allowed)

    @property
    def ends_of_text(self) -> frozenset[int]:
        """Tokens that may end a constrained text."""
        special = self.text.vocabulary.special
        return self.ends | (special & set(self.request.sampling.stop_token_ids))


N = TypeVar("N", int, float)
LEAST: Final = 1e-6
"""Temperatures and top_p between 0 and this mean this: less would divide by what float32 takes for 0."""


def first(requested: N | None, adapters: N | None, default: N) -> N:
    """Return what the request says, else what the adapter brings."""
    chosen = adapters if requested is None else requested
    return default if chosen is None else chosen


def completing(words: Iterable[tuple[int, ...]]) -> dict[int, dict[tuple[int, ...], tuple[int, ...]]]:
    """Return the tokens that complete one of these words, by how many and which stand before them."""
    found: dict[int, dict[tuple[int, ...], tuple[int, ...]]] = {}
    for *before, last in words:
        lasts = found.setdefault(len(before), {})
        lasts[tuple(before)] = (*lasts.get(tuple(before), ()), last)
    return found


def drawable(value: float) -> float:
    """Return a value that is 0 or not below the least."""
    return max(LEAST, value) if value else value


def room(requested: int | None, prompt_tokens: int, max_seq_len: int) -> int:
    """Return how many new tokens fit behind a prompt; raise PromptTooLong for fewer than requested."""
    left = max_seq_len - prompt_tokens
    if requested == 0 and left < 0:
        raise PromptTooLong(
            f"the prompt has {prompt_tokens} tokens, and at most {max_seq_len} are served. Shorten the prompt."
        )
    if left < 1 and requested != 0:
        raise prompt_too_long(prompt_tokens, max_seq_len)
    if requested is not None and requested > left:
        raise PromptTooLong(
            f"{prompt_tokens} tokens of prompt and {requested} of answer exceed the longest "
            f"sequence of {max_seq_len}. Shorten the prompt, or ask for at most {left} tokens."
        )
    return left
