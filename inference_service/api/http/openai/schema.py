"""The bodies of requests, apart from chat's own fields, and rules between their fields.

Types are checked here and bounds in `serving`, which both APIs share. A field whose type is None is one that
this server cannot honour: any value of it is refused by name; null is "not set" everywhere. The last group of
fields of `SamplingBody` is accepted because clients send them, and none of them changes an answer. Rules
between fields are as JSON Schema tells them to readers of `openapi`; validators judge them.
"""

from functools import partial
from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from inference_service.api.http.wire.body import TOKEN_IDS, Body, Examples, Made, Noun, Same, having
from inference_service.api.requests.bounds import VARIABLES
from inference_service.api.requests.pooling import MAX_INPUTS

NOT_NULL: Final[dict[str, Any]] = {"not": {"type": "null"}}


ONE_STRUCTURE: Final[dict[str, Any]] = {
    "oneOf": [having(name, NOT_NULL) for name in ("json", "regex", "choice", "grammar")]
    + [having("json_object", {"const": True})]
}
REASONING: Final = ("reasoning", "reasoning_content")
"""Fields of an assistant's reasoning."""
WITHOUT_CALLS: Final[dict[str, Any]] = {
    "tool_calls": {"maxItems": 0},
    **{name: {"type": "null"} for name in REASONING},
}
"""Schema of what only an assistant says: no calls, or null, and no reasoning."""
BY_ROLE: Final[dict[str, Any]] = {
    "oneOf": [
        {"properties": {"role": {"const": "assistant"}}},
        {
            "required": ["tool_call_id"],
            "properties": {"role": {"const": "tool"}, "tool_call_id": {"type": "string", "minLength": 1}}
            | WITHOUT_CALLS,
        },
        {"properties": {"role": {"enum": ["developer", "system", "user"]}} | WITHOUT_CALLS},
    ]
}
SAYS_SOMETHING: Final[dict[str, Any]] = {
    "anyOf": [
        *(having(name, NOT_NULL) for name in ("content", "refusal", *REASONING)),
        having("tool_calls", {"type": "array", "minItems": 1}),
    ]
}
SCHEMA_BY_TYPE: Final[dict[str, Any]] = {
    "oneOf": [
        {
            "required": ["json_schema"],
            "properties": {"type": {"const": "json_schema"}, "json_schema": NOT_NULL},
        },
        {"properties": {"type": {"enum": ["text", "json_object"]}, "json_schema": {"type": "null"}}},
    ]
}
GOES_ON: Final[dict[str, Any]] = {
    "if": having("continue_final_message", {"const": True}),
    "then": having("add_generation_prompt", {"const": False}),
}
HAS_FORM: Final[dict[str, Any]] = {"enum": ["json_object", "json_schema"]}
"""Schema of the types of a format that constrain the answer."""


MAX_PROMPTS = 256
"""Prompts of one request."""
MAX_CHOICES = 1024
"""Answers to one request: prompts times n; and texts of which an answer is one."""
EXPECTED_STRUCTURE = "exactly one of json, regex, choice, grammar and json_object"
EXPECTED_PROMPT = "a string, a list of strings, a list of token ids or a list of lists of token ids"

Variables = Annotated[dict[str, Any], Field(json_schema_extra=dict(VARIABLES))]
"""Variables of a chat template."""
Prompt = str | list[int]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def prompts_of(value: Any, most: int) -> tuple[Prompt, ...]:
    """Return one prompt or several as several; raise PydanticCustomError for none, and for more than most."""
    prompts = value if isinstance(value, list) and not _is_ids(value) else [value]
    if not prompts or not all(isinstance(prompt, str) or _is_ids(prompt) for prompt in prompts):
        raise PydanticCustomError(TOKEN_IDS, EXPECTED_PROMPT)
    if len(prompts) > most:
        raise PydanticCustomError("prompt", "at most {most} prompts", {"most": most})
    return tuple(prompts)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop", "a string or a list of strings")
    return tuple(stops)


def _several(most: int) -> PlainValidator:
    forms = str | Ids | Annotated[list[str | Ids], Field(min_length=1, max_length=most)]
    return PlainValidator(partial(prompts_of, most=most), json_schema_input_type=forms)


Prompts = Annotated[tuple[Prompt, ...], _several(MAX_PROMPTS)]
Inputs = Annotated[tuple[Prompt, ...], _several(MAX_INPUTS)]
Stops = Annotated[tuple[str, ...], PlainValidator(_stops, json_schema_input_type=str | list[str] | None)]
Choices = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1, max_length=MAX_CHOICES)
]


class StreamOptions(Body):
    """The parts of a stream beside the answer."""

    include_usage: bool | None = None
    """Send a last chunk that has no choices and the usage."""
    continuous_usage_stats: bool | None = None
    """vLLM's: with include_usage, every chunk has the usage so far."""
    include_obfuscation: bool | None = None
    """Accepted; there is no padding here."""


class StructuredOutputs(Body):
    """The form of the answer, in vLLM's words."""

    model_config = ConfigDict(json_schema_extra=ONE_STRUCTURE)

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    """A JSON schema."""
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    """A grammar in GBNF, or in Lark."""
    json_object: bool | None = None
    structural_tag: None = None

    @property
    def present(self) -> dict[str, Any]:
        """Return the requested constraints, by their names here."""
        return {name: value for name, value in self if value is not None and value is not False}

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.present) != 1:
            raise PydanticCustomError("structured_outputs", EXPECTED_STRUCTURE)
        return self


class SamplingBody(Body):
    """The fields of all bodies that ask for text: the model, and the sampling of its tokens."""

    model: Same[str]
    temperature: Same[float | None] = None
    top_p: Same[float | None] = None
    stop: Same[Stops] = ()
    seed: Same[Annotated[int, Field(ge=-(2**63), lt=2**63)] | None] = None
    presence_penalty: Same[float | None] = None
    frequency_penalty: Same[float | None] = None
    logit_bias: Same[dict[int, float] | None] = None

    # vLLM's
    top_k: Same[int | None] = None
    min_p: Same[float | None] = None
    min_tokens: Same[int | None] = None
    repetition_penalty: Same[float | None] = None
    ignore_eos: Same[bool | None] = None
    stop_token_ids: Same[tuple[int, ...] | None] = None
    include_stop_str_in_output: Same[bool | None] = None
    structured_outputs: StructuredOutputs | None = None
    bad_words: Same[tuple[str, ...] | None] = None
    allowed_token_ids: Same[tuple[int, ...] | None] = None
    cache_salt: Same[str | None] = None
    request_id: Made[str | None] = None
    skip_special_tokens: Same[bool | None] = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    """Lower is earlier."""
    lora_path: Same[str | None] = None
    """SGLang's; the adapter that model names."""

    # ours
    min_generation: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    logprobs_mode: Same[str | None] = None
    """raw or processed; vLLM has it as a flag of the server."""

    user: str | None = None
    """Picks among the models of an alias."""
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None


class GenerationBody(SamplingBody):
    """The fields that chat and plain completions have in common."""

    n: Same[int | None] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Same[int | None] = None

    # vLLM's
    prompt_logprobs: Same[int | None] = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: Same[int | None] = None
    add_special_tokens: Same[bool | None] = None

    @property
    def include_usage(self) -> bool:
        """True when a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """True when every chunk of a stream holds the usage so far."""
        return bool(self.include_usage and self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionBody(GenerationBody):
    """``POST /v1/completions``."""

    examples: ClassVar[Examples] = {
        "text": {"prompt": "The party of the first part", "max_tokens": 8},
        "several": {"prompt": ["One", "Two"], "max_tokens": 4, "temperature": 0, "n": 2},
        "tokens": {"prompt": [5, 6, 7], "max_tokens": 4, "logprobs": 1, "echo": True},
        "stream": {"prompt": "Once", "max_tokens": 4, "stream": True},
    }

    prompt: Annotated[Prompts, Noun(also=("token_ids",), taken=False)]
    echo: bool | None = None
    logprobs: Same[int | None] = None
    best_of: int | None = None
    """Only the same as n."""
    suffix: None = None
