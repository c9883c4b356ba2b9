"""``POST /v1/messages`` and ``POST /v1/messages/count_tokens``."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from inference_service.chat.conversation import Conversation
from inference_service.http.anthropic.answer import Answer
from inference_service.http.anthropic.mapping import chat_of
from inference_service.http.anthropic.schema import CountBody, MessagesBody
from inference_service.http.wire.body import read_body
from inference_service.http.wire.refusals import fault_body
from inference_service.http.wire.reply import json_response
from inference_service.http.wire.stream import named, open_stream, while_connected
from inference_service.serving.service import GenerationService


async def create_message(service: GenerationService, http: HttpRequest) -> Response:
    """Answer a conversation, as Anthropic's API has it."""
    body = await read_body(http, MessagesBody)
    answer = Answer(service, body, chat_of(body, http.headers))
    if body.stream:
        framing = named(partial(fault_body, http.scope))
        return await open_stream(http.receive, answer.events(), answer.head, framing)
    whole = await while_connected(http.receive, answer.whole())
    return json_response(whole, headers=answer.head.headers)


async def count_tokens(service: GenerationService, http: HttpRequest) -> Response:
    """Count the tokens of a conversation's prompt."""
    chat = chat_of(await read_body(http, CountBody), http.headers)
    tokens = await Conversation(service, chat).prompt_tokens()
    return json_response({"input_tokens": tokens})
