"""``POST /tokenize`` and ``POST /detokenize``, in vLLM's shapes."""

import asyncio
from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import Request as HttpRequest
from typing_extensions import TypedDict

from inference_service.api.chat.dialect import dialect_of
from inference_service.api.chat.request import check_calls
from inference_service.api.http.openai.chat_schema import Messages, Tool
from inference_service.api.http.openai.mapping import tool_of, turns_of
from inference_service.api.http.openai.schema import GOES_ON, NOT_NULL, Variables
from inference_service.api.http.wire.body import Body, Examples, Made, read_body
from inference_service.api.http.wire.reply import Reply
from inference_service.api.requests.bounds import check_turns, countable, refused
from inference_service.api.requests.service import GenerationService
from inference_service.core.served_model import NO_DEFAULTS, AdapterDefaults

OF_MESSAGES: Final = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
"""Fields of rendering messages."""
ONE_OF_TWO: Final[dict[str, Any]] = {
    "oneOf": [
        {
            "required": ["prompt"],
            "properties": {"prompt": NOT_NULL}
            | {name: {"type": "null"} for name in ("messages", *OF_MESSAGES)},
        },
        {"required": ["messages"], "properties": {"messages": NOT_NULL, "prompt": {"type": "null"}}},
    ]
}


class TokenizeBody(Body):
    """``POST /tokenize``: a prompt, or messages."""

    model_config = ConfigDict(json_schema_extra=ONE_OF_TWO | GOES_ON)
    examples: ClassVar[Examples] = {
        "prompt": {"prompt": "The party of the first part"},
        "messages": {"messages": [{"role": "user", "content": "Hello"}], "return_token_strs": True},
    }

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Made[tuple[Tool, ...] | None] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Variables | None = None
    add_special_tokens: bool | None = None
    """Whether to add the tokenizer's own special tokens; when not set, true of a prompt and false of
    messages.
    """
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "either prompt or messages")
        if self.prompt is not None and any(getattr(self, name) is not None for name in OF_MESSAGES):
            raise PydanticCustomError("prompt", f"{', '.join(OF_MESSAGES)} only with messages")
        return self


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    examples: ClassVar[Examples] = {"tokens": {"tokens": [5, 6, 7]}}

    model: str | None = None
    tokens: tuple[Annotated[int, Field(json_schema_extra={"minimum": 0})], ...]


class Tokens(TypedDict):
    """The tokens of a text, and their texts where these were asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Prompt(TypedDict):
    """The text of tokens."""

    prompt: str


async def tokenize(service: GenerationService, http: HttpRequest) -> Reply[Tokens]:
    """Return the tokens of a text, or of messages as the model's template renders them."""
    body = await read_body(http, TokenizeBody)
    defaults = await _defaults(service, body.model)
    text = defaults.text or service.text
    most = countable(service.limits.max_seq_len)
    if body.messages is not None:
        dialect = dialect_of(text, defaults.template, service.parsers)
        turns = turns_of(body.messages)
        check_calls(turns)
        messages = dialect.turns([turn.message() for turn in turns])
        tools = [tool_of(tool).rendered() for tool in body.tools or ()]
        starts = body.add_generation_prompt is not False
        variables = body.chat_template_kwargs or {}
        check_turns(messages, tools, variables, goes_on=bool(body.continue_final_message), starts=starts)
        tokens = await text.encode_messages(
            messages,
            most,
            defaults.template,
            tools,
            variables,
            add_generation_prompt=starts,
            add_special_tokens=bool(body.add_special_tokens),
            continue_final_message=bool(body.continue_final_message),
        )
    else:
        special = body.add_special_tokens is not False
        tokens = await asyncio.to_thread(
            text.encode_prompt, body.prompt or "", most, add_special_tokens=special
        )
    names = [text.token_text(token) for token in tokens] if body.return_token_strs else None
    return Reply(
        {
            "count": len(tokens),
            "max_model_len": service.limits.max_seq_len,
            "tokens": list(tokens),
            "token_strs": names,
        }
    )


async def detokenize(service: GenerationService, http: HttpRequest) -> Reply[Prompt]:
    """Return the text of tokens."""
    body = await read_body(http, DetokenizeBody)
    text = (await _defaults(service, body.model)).text or service.text
    most = countable(service.limits.max_seq_len)
    if len(body.tokens) > most:
        raise refused("tokens", f"at most {most} ids", len(body.tokens))
    foreign = [token for token in body.tokens if not 0 <= token < text.vocab]
    if foreign:
        raise refused("tokens", f"ids from 0 to {text.vocab - 1}", foreign[:5])
    prompt = await asyncio.to_thread(text.decode, body.tokens, skip_special_tokens=False)
    return Reply({"prompt": prompt})


async def _defaults(service: GenerationService, model: str | None) -> AdapterDefaults:
    """Return what a model brings; without a name, the base."""
    return await service.defaults(service.local.catalog.resolve(model)) if model else NO_DEFAULTS
