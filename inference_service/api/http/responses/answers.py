"""The answers of the Responses API: a response, and the events of one that is streamed.

Sources: `openai.types.responses.Response` and https://www.openresponses.org/reference
"""

from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from inference_service.api.http.openai.answers import TokenLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputTextPart(TypedDict):
    """Text of a message; there are no annotations here."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class OutputMessage(TypedDict):
    """Text of the answer."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputTextPart]


class ThoughtPart(TypedDict):
    """Text of reasoning."""

    type: Literal["reasoning_text"]
    text: str


class ThoughtItem(TypedDict):
    """Reasoning; clients give the encrypted content back unread, where they asked for it."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Any]
    content: list[ThoughtPart]
    encrypted_content: NotRequired[str]


class CalledItem(TypedDict):
    """A call of a function, with its arguments as JSON text."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    namespace: NotRequired[str]
    arguments: str


AnsweredItem = OutputMessage | ThoughtItem | CalledItem


class InputDetails(TypedDict):
    """The number of the input's tokens that were found in the prefix cache."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(TypedDict):
    """The number of the output's tokens that were reasoning."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Tokens."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseError(TypedDict):
    """Why it failed; the reason is this server's name for it."""

    message: str
    type: str
    param: str | None
    code: str
    reason: str


class IncompleteDetails(TypedDict):
    """Why it is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseReasoning(TypedDict):
    """The reasoning options of the request."""

    effort: str | None
    summary: None


class Response(TypedDict):
    """A response: the request's options, the output, and the status."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    output: list[AnsweredItem]
    usage: ResponseUsage | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    text: dict[str, Any]
    reasoning: ResponseReasoning
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int
    truncation: Literal["auto", "disabled"]
    metadata: dict[str, str]
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    service_tier: Literal["default"]
    store: Literal[False]
    background: Literal[False]
    previous_response_id: None


class InputTokens(TypedDict):
    """Tokens of a prompt."""

    object: Literal["response.input_tokens"]
    input_tokens: int


@with_config(ConfigDict(extra="allow"))
class ResponseEvent(TypedDict):
    """An event of a response; its type says which other fields it has."""

    type: str
    sequence_number: int
