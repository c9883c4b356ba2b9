"""``POST /v1/chat/completions``, and its answers: messages, or chunks of them."""

from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from contextlib import aclosing

from starlette.requests import Request as HttpRequest

from inference_service.api.chat.conversation import AnswerPart, Conversation
from inference_service.api.chat.request import CallArguments, CallBegun, Piece, TextPiece, Thought
from inference_service.api.http.openai.answers import (
    REASONS,
    CallPart,
    ChatAnswer,
    ChatAnswerPart,
    ChatCompletion,
    ChatCompletionChunk,
    ChatEnded,
    ChatLogprobs,
    FunctionPart,
    MadeCall,
    MadeMessage,
    MessagePart,
    PromptPart,
    Tally,
    Usage,
    ended_by,
    usage,
)
from inference_service.api.http.openai.chat_schema import ChatBody
from inference_service.api.http.openai.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from inference_service.api.http.openai.mapping import chat_of
from inference_service.api.http.wire.body import read_body
from inference_service.api.http.wire.reply import (
    EventStream,
    Head,
    Reply,
    TextEvent,
    encoded,
    open_stream,
    sink_of,
    while_connected,
)
from inference_service.api.requests.service import GenerationService
from inference_service.core.request import AnswerDelta, AnswerFinished, AnswerStarted, PromptScores
from inference_service.core.sequence import EndReason, Token
from inference_service.driver.delivery import Sink


class ChatChoice:
    """One of the answers: collects its message, and writes the chunks of a stream."""

    def __init__(self, index: int, stops: Collection[str], names: TokenNames | None, *, ids: bool) -> None:
        """Begin an answer that stops may end.

        Log probabilities are written where TokenNames are given, and token ids where `ids` is true.
        """
        self._ids: list[int] | None = [] if ids else None
        self._index = index
        self._stops = stops
        self._names = names
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[MadeCall] = []
        self._tokens: list[Token] = []
        self._finish_reason: ChatEnded | None = None
        self._stop_reason: str | int | None = None
        self._begun = False
        self._unread = 0
        """Tokens since the last piece."""
        self.reasoning_tokens = 0

    def take(self, part: AnswerPart) -> None:
        """Collect more of the answer, or its end."""
        event = part.event
        if isinstance(event, AnswerDelta):
            if self._names is not None:
                self._tokens += event.tokens
            if self._ids is not None:
                self._ids += [token.id for token in event.tokens]
            self._unread += len(event.tokens)
        self._collect(part.pieces)
        if isinstance(event, AnswerFinished):
            called = bool(self._calls) and event.reason is EndReason.STOP
            self._finish_reason = "tool_calls" if called else REASONS[event.reason]
            self._stop_reason = ended_by(event, self._stops)

    def _collect(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            self.reasoning_tokens += self._unread if isinstance(piece, Thought) else 0
            self._unread = 0
            match piece:
                case TextPiece():
                    self._content.append(piece.text)
                case Thought():
                    self._reasoning.append(piece.text)
                case CallBegun():
                    self._calls.append(
                        {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": ""}}
                    )
                case CallArguments():
                    self._calls[piece.index]["function"]["arguments"] += piece.text

    def whole(self) -> ChatAnswer:
        """Return the choice of an answer that has ended."""
        assert self._finish_reason is not None  # noqa: S101 - every answer of a request that did not fail ends
        text = "".join(self._content)
        content = None if self._calls and not text.strip() else text
        message: MadeMessage = {"role": "assistant", "content": content, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = message["reasoning"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = self._calls
        choice: ChatAnswer = {
            "index": self._index,
            "message": message,
            "logprobs": None if self._names is None else chat_logprobs(self._tokens, self._names),
            "finish_reason": self._finish_reason,
            "stop_reason": self._stop_reason,
        }
        if self._ids is not None:
            choice["token_ids"] = self._ids
        return choice

    def text_alone(self, part: AnswerPart) -> str | None:
        """Return the text of a part whose chunk differs from others in its text alone."""
        pieces = part.pieces
        if not self._begun or self._names is not None or self._ids is not None or len(pieces) != 1:
            return None
        if not isinstance(pieces[0], TextPiece):
            return None
        self._unread = 0
        return pieces[0].text

    def text_part(self, text: str) -> ChatAnswerPart:
        """Return the choice of more text in a chunk."""
        return self._choice({"content": text})

    def parts(self, part: AnswerPart) -> list[ChatAnswerPart]:
        """Collect more of the answer, or its end; return its choices in chunks.

        The first choice of all has the role, the last one the reason of the end.
        """
        self.take(part)
        event, pieces = part.event, part.pieces
        if isinstance(event, AnswerFinished):
            return self._opened([*self._parts(pieces), self._choice({}, ended=True)])
        scores = None if self._names is None else chat_logprobs(event.tokens, self._names)
        if (scores or self._ids is not None) and not pieces:
            pieces = [TextPiece("")]
        parts = self._parts(pieces, scores)
        if self._ids is not None:
            parts[0]["token_ids"] = [token.id for token in event.tokens]
        return self._opened(parts)

    def _opened(self, parts: list[ChatAnswerPart]) -> list[ChatAnswerPart]:
        if self._begun or not parts:
            return parts
        self._begun = True
        content = None if "tool_calls" in parts[0]["delta"] else ""
        return [self._choice({"role": "assistant", "content": content, "refusal": None}), *parts]

    def _parts(self, pieces: Sequence[Piece], scores: ChatLogprobs | None = None) -> list[ChatAnswerPart]:
        """Return a choice for each piece, the first with the log probabilities."""
        return [self._choice(_delta(piece), scores if not nth else None) for nth, piece in enumerate(pieces)]

    def _choice(
        self, delta: MessagePart, scores: ChatLogprobs | None = None, *, ended: bool = False
    ) -> ChatAnswerPart:
        choice: ChatAnswerPart = {
            "index": self._index,
            "delta": delta,
            "logprobs": scores,
            "finish_reason": self._finish_reason if ended else None,
            "stop_reason": self._stop_reason if ended else None,
        }
        if self._ids is not None:
            choice["token_ids"] = []
        return choice


def _delta(piece: Piece) -> MessagePart:
    call: CallPart
    match piece:
        case TextPiece():
            return {"content": piece.text}
        case Thought():
            return {"reasoning_content": piece.text, "reasoning": piece.text}
        case CallBegun():
            function: FunctionPart = {"name": piece.name, "arguments": ""}
            call = {"index": piece.index, "id": piece.id, "type": "function", "function": function}
        case CallArguments():
            call = {"index": piece.index, "function": {"arguments": piece.text}}
    return {"tool_calls": [call]}


async def chat_completions(
    service: GenerationService, http: HttpRequest
) -> Reply[ChatCompletion] | EventStream[ChatCompletionChunk]:
    """Answer a conversation."""
    body = await read_body(http, ChatBody)
    chat = Chat(service, body, Conversation(service, chat_of(body, http.headers)))
    if body.stream:
        return await open_stream(http.receive, chat.chunks(http), chat.head)
    whole = await while_connected(http.receive, chat.whole())
    return Reply(whole, headers=chat.head.headers)


class Chat:
    """A conversation and its answers, in the form of this route."""

    def __init__(self, service: GenerationService, body: ChatBody, conversation: Conversation) -> None:
        self._text = service.text
        """The text side of the model that answers; the base's until that is known."""
        self._body = body
        self._conversation = conversation
        self.head = Head(f"chatcmpl-{conversation.request.id}", body.model)
        self._choices: list[ChatChoice] = []
        """Made when the request was accepted: before that, n is unchecked input."""
        self._prompt: PromptPart = {}
        """Report about the prompt, with the answer or with its first chunk."""
        self._ends: list[AnswerFinished] = []
        self._tally = Tally()
        self._events: dict[int, TextEvent] = {}
        """Events with text, by the answer's index."""

    async def whole(self) -> ChatCompletion:
        """Return the answers at once."""
        async with aclosing(self._answers()) as answers:
            async for part in answers:
                self._choices[part.event.index].take(part)
        return {
            "id": self.head.id,
            "object": "chat.completion",
            "created": self.head.created,
            "model": self.head.model,
            "system_fingerprint": self.head.fingerprint,
            "choices": [choice.whole() for choice in self._choices],
            "usage": self._usage(),
            **self._prompt,
        }

    async def chunks(self, http: HttpRequest) -> AsyncGenerator[ChatCompletionChunk]:
        """Yield the answers in chunks as they are generated, but for those that are written at once."""
        async with aclosing(self._answers(sink_of(http, self._written))) as answers:
            async for part in answers:
                for choice in self._choices[part.event.index].parts(part):
                    yield self._chunk_of(choice)
        if self._body.include_usage:
            yield {**self._chunk([]), "usage": self._usage()}

    def _written(self, part: AnswerPart) -> bytes:
        index = part.event.index
        choice = self._choices[index]
        if self._prompt or self._body.continuous_usage or (text := choice.text_alone(part)) is None:
            self._tally.see(part.event)
            return encoded(map(self._chunk_of, choice.parts(part)))
        if index not in self._events:
            self._events[index] = TextEvent(lambda text: self._chunk_of(choice.text_part(text)))
        return self._events[index].of(text)

    def _chunk_of(self, choice: ChatAnswerPart) -> ChatCompletionChunk:
        chunk = self._chunk([choice])
        if self._body.continuous_usage:
            chunk["usage"] = self._tally.usage(choice["index"])
        elif self._body.include_usage:
            chunk["usage"] = None
        prompt, self._prompt = self._prompt, {}
        return {**chunk, **prompt} if prompt else chunk

    async def _answers(self, sink: Sink[AnswerPart] | None = None) -> AsyncGenerator[AnswerPart]:
        """Yield more of the answers, or an end of one; what comes before them is noted."""
        async with aclosing(self._conversation.events(sink)) as events:
            async for event in events:
                match event:
                    case AnswerStarted():
                        self._begin(event)
                    case PromptScores():
                        self._prompt["prompt_logprobs"] = prompt_logprobs(event.tokens, self._text)
                    case AnswerPart():
                        self._tally.see(event.event)
                        if isinstance(event.event, AnswerFinished):
                            self._ends.append(event.event)
                        yield event

    def _begin(self, started: AnswerStarted) -> None:
        self.head.begin(started)
        self._text = started.text
        self._tally.see(started)
        names = TokenNames(started.text, bool(self._body.return_tokens_as_token_ids))
        scored = names if self._body.logprobs else None
        ids = bool(self._body.return_token_ids)
        indices = range(self._conversation.request.output.n)
        self._choices = [ChatChoice(index, self._body.stop, scored, ids=ids) for index in indices]
        if ids:
            self._prompt["prompt_token_ids"] = list(started.prompt_token_ids)

    def _chunk(self, choices: list[ChatAnswerPart]) -> ChatCompletionChunk:
        return {
            "id": self.head.id,
            "object": "chat.completion.chunk",
            "created": self.head.created,
            "model": self.head.model,
            "system_fingerprint": self.head.fingerprint,
            "choices": choices,
        }

    def _usage(self) -> Usage:
        return usage(self._ends, sum(choice.reasoning_tokens for choice in self._choices))
