"""The request of an API, and the events that answer it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from inference_service.adapters.mixing import ScaledAdapter
from inference_service.adapters.served_model import ServedModel
from inference_service.core.constraint import ByEnding, Constraint
from inference_service.core.sampling import KNOBS, Sampling
from inference_service.core.sequence import FinishReason, Token, Vector
from inference_service.text.text import Text
from loramux_shared.faults import Finding, RequestInvalid
from loramux_shared.pooling import Pooling

Message = Mapping[str, Any]
"""A turn as chat templates know it: role, content (text or None), and name, tool_calls, tool_call_id,
reasoning_content and reasoning (both the same)."""


class TextPair(NamedTuple):
    """Two texts that are looked at together, as the tokenizer joins them."""

    first: str
    second: str


NO_SAMPLING: Final = Sampling()
"""Nothing is said about it."""
Prompt = str | list[int] | list[Message] | TextPair
"""Text, token ids, chat messages, or two texts."""


@dataclass(frozen=True)
class Served:
    """The model of a name when it was looked up."""

    model: ServedModel
    generation: int
    """Generation of the look-up."""


@dataclass(frozen=True)
class Request:
    """A request for one or more answers; None means that the client left it unset."""

    model: str
    """A name, an alias, ``NAME@DIGEST``, ``BASE:NAME``, ``NAME*SCALE+NAME``: see `catalog.Catalog.resolve`."""
    prompt: Prompt
    sampling: Sampling = NO_SAMPLING
    """Sampling of its answers' tokens, and their ends."""
    min_generation: int = 0
    """The name is looked up in this generation of the deployment, or in a later one."""
    sticky_key: str = ""
    """Requests with the same one get the same model of an alias."""
    adapters: tuple[ScaledAdapter, ...] = ()
    """Adapters with scales; model is empty or the base's then."""
    lora_path: str | None = None
    """An adapter of the base that model names, or the same adapter once more; SGLang's clients name it so."""
    served: Served | None = None
    """The model, where the API has looked it up already: for the prompts of one call together."""
    n: int = 1
    """Answers; the first is the one that a request for one would have, the others have seeds of their own."""
    pooling: Pooling | None = None
    """The prompt's hidden states become a vector, as this says, and nothing is answered: max_tokens is 0."""
    constraint: Constraint | None = None
    constraint_by_ending: ByEnding | None = None
    """The constraint where it depends on how the rendered prompt ends; comes before it."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    shown_special_tokens: tuple[str, ...] = ()
    """These are in the text all the same, where the tokenizer has them."""
    add_generation_prompt: bool = True
    """End rendered messages with the beginning of the assistant's turn."""
    continue_final_message: bool = False
    """End rendered messages within the last one, which the answers go on with."""
    add_special_tokens: bool | None = None
    """Tokenize with the special tokens that the tokenizer adds itself; None: a text, but not messages."""
    truncate_prompt_tokens: int | None = None
    """Leave out the beginning of a prompt with more tokens; -1: of one that leaves the answer no room."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Rendered by the chat template."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template beside the usual ones, such as ``enable_thinking``."""
    cache_salt: str | None = None
    """Only requests with the same one find each other's prompts in the prefix cache."""
    priority: int = 0
    deadline_s: float | None = None
    """On the clock of ``time.monotonic``."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """For logs, traces and the client; nothing is looked up by it, and two requests may have the same."""

    @classmethod
    def of(cls, model: str, prompt: Prompt, **flat: Any) -> Request:
        """Return a request from its fields and those of its sampling, side by side as wire formats have them.

        A field of the sampling that is None is not set.
        """
        sampling = {name: flat.pop(name) for name in KNOBS.keys() & flat.keys()}
        given = {name: value for name, value in sampling.items() if value is not None}
        return cls(model, prompt, Sampling(**given) if given else NO_SAMPLING, **flat)


@dataclass(frozen=True)
class Started:
    """The request was accepted."""

    request_id: str
    model: ServedModel
    """Model that answers it to the end."""
    generation: int
    """Generation by which its name was looked up."""
    prompt_tokens: int
    text: Text
    """Tokenizer of its tokens."""
    prompt_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class PromptLogprobs:
    """All tokens of the prompt; comes once, before the first Delta, when the request asks for it."""

    tokens: tuple[Token, ...]
    """The first has no log probability: nothing stands before it."""


@dataclass(frozen=True)
class Pooled:
    """The hidden states of the prompt as one vector; comes once, and no Delta comes beside it."""

    vector: Vector


WORDLESS: Final = 4
"""Tokens without text for which the beginning of an answer waits: the bytes of a character."""


@dataclass(frozen=True)
class Delta:
    """New text of an answer, and the tokens that were decoded for it."""

    text: str
    tokens: tuple[Token, ...]
    index: int = 0
    """Index of the answer among the n."""


@dataclass(frozen=True)
class Finished:
    """An answer is complete."""

    reason: FinishReason
    stop_text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    index: int = 0
    """Index of the answer among the n."""
    stop_token_id: int | None = None
    """The stop token that ended it, where the request named it and it is no end-of-sequence token."""


Event = Started | PromptLogprobs | Pooled | Delta | Finished


MIN_GENERATION: Final = "x-loramux-min-generation"
STICKY_KEY: Final = "x-loramux-key"
MAX_GENERATION: Final = 2**63 - 1


def hinted(headers: Mapping[str, str], min_generation: int = 0, sticky_key: str = "") -> dict[str, Any]:
    """Return the fields of a request that are also said in headers, from these and from the body's own.

    Of two generations the higher one counts, and a header's key comes before the body's: proxies set headers.

    Raises:
        RequestInvalid: a header is no number, or the number is none of a generation.
    """
    said = headers.get(MIN_GENERATION, "0")
    if not re.fullmatch(r"[0-9]{1,19}", said):
        raise _out_of_bounds(MIN_GENERATION, repr(said[:80]))
    wanted = max(int(said), min_generation)
    if wanted > MAX_GENERATION:
        raise _out_of_bounds("min_generation", str(wanted))
    return {"min_generation": wanted, "sticky_key": headers.get(STICKY_KEY) or sticky_key}


def _out_of_bounds(where: str, found: str) -> RequestInvalid:
    finding = Finding(
        code="E_BAD_FIELD",
        where=where,
        expected=f"the number of a generation, 0 to {MAX_GENERATION}",
        found=found,
    )
    return RequestInvalid("the request asks for no generation.", [finding])
