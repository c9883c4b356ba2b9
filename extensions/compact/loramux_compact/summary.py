"""``POST /v1/responses/compact``: a conversation becomes a summary of it, which continues in its place.

The model that would answer sums up. Nothing is stored: the summary is the answer, in an item that clients give
back unread.
Sources: `openai.types.responses.CompactedResponse` and https://www.openresponses.org/specification
"""

import secrets
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Final, Literal

from starlette.requests import Request as HttpRequest
from typing_extensions import TypedDict

from inference_service.chat.conversation import AnswerPart, Conversation
from inference_service.chat.request import NO_HEADERS, SWITCHES, ChatRequest, Turn, check_tools
from inference_service.http.endpoint import Endpoint
from inference_service.http.openai.mapping import one_constraint, request_of
from inference_service.http.openai.schema import SamplingBody
from inference_service.http.responses.answers import ItemStatus, ResponseUsage
from inference_service.http.responses.create import usage_of
from inference_service.http.responses.items import NOTHING_STORED, CallItem, Input, Item, OutputItem, carried
from inference_service.http.responses.mapping import PLACE, leading, turns_of
from inference_service.http.responses.output import OutputItems
from inference_service.http.wire.body import Examples, Noun, in_words_of, names, read_body, unserved
from inference_service.http.wire.reply import Head, Reply, while_connected
from inference_service.serving.bounds import refused
from inference_service.serving.request import AnswerDelta, AnswerFinished, AnswerStarted
from inference_service.serving.service import GenerationService
from loramux_shared.faults import RequestInvalid
from loramux_shared.routes import COMPACT

ASK: Final = (
    "Sum up our conversation up to here: in its place, the summary is all that you will know of it. Keep what "
    "was asked, decided, found and left to do, with names, numbers and code as they were. Write nothing else."
)
NO_SUMMARY: Final = (
    "the model generated no summary of the conversation. Allow more tokens, or use another model."
)


class CompactBody(SamplingBody):
    """``POST /v1/responses/compact``."""

    examples: ClassVar[Examples] = {
        "turns": {
            "input": [
                {"role": "user", "content": "My order is late."},
                {"role": "assistant", "content": "Which one?"},
                {"role": "user", "content": "Number 7, since Monday."},
            ],
            "max_output_tokens": 8,
        },
    }

    input: Annotated[Input, Noun("messages", also=("prompt",), taken=False)]
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, Noun("max_tokens")] = None
    """Longest summary."""
    previous_response_id: Annotated[None, unserved(NOTHING_STORED)] = None
    image: None = None


class InstructionPart(TypedDict):
    """Input text."""

    type: Literal["input_text"]
    text: str


class InstructionItem(TypedDict):
    """The instructions of a system or a developer before the first other message."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["system", "developer"]
    content: list[InstructionPart]


class SummaryItem(TypedDict):
    """A summary that clients send back unchanged."""

    id: str
    type: Literal["compaction"]
    encrypted_content: str


class Compaction(TypedDict):
    """A summary that replaces a conversation."""

    id: str
    object: Literal["response.compaction"]
    created_at: int
    output: list[InstructionItem | SummaryItem]
    usage: ResponseUsage


async def compact(service: GenerationService, http: HttpRequest) -> Reply[Compaction]:
    """Summarize a conversation, to continue without its items."""
    body = await read_body(http, CompactBody)
    items = () if isinstance(body.input, str) else body.input
    _check_answered(items)
    conversation = Conversation(service, asking(chat_to_sum_up(body, http.headers)))
    head = Head(f"resp_{conversation.request.id}", body.model)
    summary, usage = await while_connected(http.receive, _summary(conversation, head))
    answer: Compaction = {
        "id": head.id,
        "object": "response.compaction",
        "created_at": head.created,
        "output": [*_instructions(items), _compaction(summary)],
        "usage": usage,
    }
    return Reply(answer, headers=head.headers)


def asking(chat: ChatRequest) -> ChatRequest:
    """Return a chat that ends with the question for a summary; templates may refuse two turns of the user."""
    if not chat.turns:
        raise refused("input", "at least one message or call to summarise", "none")
    *before, last = chat.turns
    if last.role != "user":
        return replace(chat, turns=(*chat.turns, Turn("user", ASK, place=PLACE)))
    return replace(chat, turns=(*before, replace(last, content=f"{last.content}\n\n{ASK}")))


def _check_answered(items: Sequence[Item]) -> None:
    """Refuse calls without outputs: after the summary, their outputs could not be matched."""
    outputs = {item.call_id for item in items if isinstance(item, OutputItem)}
    for index, item in enumerate(items):
        if isinstance(item, CallItem) and item.call_id not in outputs:
            raise refused(f"input[{index}]", "a function_call with its function_call_output", "one without")


async def _summary(conversation: Conversation, head: Head) -> tuple[str, ResponseUsage]:
    """Return the summary and the tokens that it took.

    Raises:
        Fault: there is none.
    """
    output = OutputItems(None, (), carries=False)
    usage: ResponseUsage | None = None
    async with aclosing(conversation.events()) as events:
        async for event in events:
            match event:
                case AnswerStarted():
                    head.begin(event)
                case AnswerPart(AnswerDelta() as delta, pieces):
                    output.take(pieces, delta.tokens)
                case AnswerPart(AnswerFinished() as finished, pieces):
                    output.end(pieces, "completed")
                    usage = usage_of(finished, output.reasoning_tokens)
    texts = [item["content"][0]["text"] for item in output.items() if item["type"] == "message"]
    summary = "\n".join(texts).strip()
    if not summary or usage is None:
        raise RequestInvalid(NO_SUMMARY)
    return summary, usage


def _compaction(summary: str) -> SummaryItem:
    return {"id": f"cmp_{secrets.token_hex(16)}", "type": "compaction", "encrypted_content": carried(summary)}


def _instructions(items: Sequence[Item]) -> list[InstructionItem]:
    """Return the instructions among the items as they were: they are not summed up alone."""
    return [
        {
            "id": item.id or f"msg_{secrets.token_hex(16)}",
            "type": "message",
            "status": "completed",
            "role": "developer" if item.role == "developer" else "system",
            "content": [{"type": "input_text", "text": item.content}],
        }
        for item in leading(items)
    ]


def chat_to_sum_up(body: CompactBody, headers: Mapping[str, str] = NO_HEADERS) -> ChatRequest:
    """Return the conversation that a body asks to sum up, of which an answer is as true as it can be.

    Raises:
        RequestInvalid: as `chat_of` does.
    """
    with in_words_of(body):
        turns = turns_of(body.instructions, body.input)
        check_tools(None, (), turns)
        temperature = 0.0 if body.temperature is None else body.temperature
        return ChatRequest(
            turns,
            constraint=one_constraint(None, body.structured_outputs),
            rest=request_of(body, headers, temperature=temperature),
            variables=dict.fromkeys(SWITCHES, False),  # reasoning would be lost, and takes the room
            names=partial(names, body),
        )


ROUTES: Final = (Endpoint(COMPACT, compact, CompactBody, fails=(404, 429), reads_prompts=True, hinted=True),)
"""The routes of this extension."""
