"""gpt-oss's messages within an answer: a header that says for whom, a body, an end.

::

    <|channel|>analysis<|message|>The user asks for ...<|end|><|start|>assistant<|channel|>commentary
     to=functions.weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>

    <|channel|>analysis<|message|>I know.<|end|><|start|>assistant<|channel|>final<|message|>It rains.<|return|>

The recipient may stand before the channel, too. `analysis` is reasoning; `final`, and `commentary` without a
recipient, is text; a call of a function that was not offered is text, with its arguments as they are. The
prompt ends with ``<|start|>assistant``, so that an answer begins within a header. Source:
https://cookbook.openai.com/articles/openai-harmony, and the chat template of gpt-oss-120b.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from inference_service.api.chat.formats.lark import CallGrammar, OfferedTool, Spelling, either, json_of
from inference_service.api.chat.formats.reading import AnswerSource, Reader, TemplateMarks, ToolFormat, marks
from inference_service.api.chat.request import AnswerCalls, Piece, TextPiece, Thought
from inference_service.core.request import Message
from loramux_shared.runtime import ToolParser

START: Final = "<|start|>"
CHANNEL: Final = "<|channel|>"
CONSTRAIN: Final = "<|constrain|>"
MESSAGE: Final = "<|message|>"
END: Final = "<|end|>"
RETURN: Final = "<|return|>"
CALL: Final = "<|call|>"
MARKS: Final = (START, CHANNEL, CONSTRAIN, MESSAGE, END, RETURN, CALL)
MAX_HEADER: Final = 512
"""Characters; what is longer is no header."""
FUNCTIONS: Final = "functions."
_CHANNEL: Final = re.compile(r"<\|channel\|>\s*(\w+)")
_TO: Final = re.compile(r"\bto=([^\s<]+)")


def messages(source: AnswerSource, calls: AnswerCalls, *, visible: bool = True) -> Reader[None]:
    """Read the messages of an answer; if not visible, reasoning is text too."""
    spoken = {TextPiece: False, Thought: False}
    first = True
    while True:
        header = yield from _header(source, begins=first)
        if header is None:
            return
        channel, recipient = _CHANNEL.search(header), _TO.search(header)
        name = recipient[1].removeprefix(FUNCTIONS) if recipient else ""
        if name in calls.offered:
            yield calls.begin(name)
            yield from _body(source, calls)
        else:
            kind = Thought if channel and channel[1] == "analysis" and not recipient and visible else TextPiece
            yield from _body(source, kind, behind=spoken[kind])
            spoken[kind] = True
        first = False


def _header(source: AnswerSource, *, begins: bool) -> Reader[str | None]:
    """Read to a body, and return what stands before; None at the end.

    An answer that does not begin as a header does is a body itself: one that continues with a message.
    """
    source.forget()
    if begins:
        yield from source.spaces()
        opens = (
            (yield from source.literal(CHANNEL))
            or (yield from source.literal("to="))
            or (yield from source.literal(START))
        )
        if not opens:
            source.at = 0
            return "" if source.left or not source.ended else None
        source.at = 0
    header = yield from source.upto(MESSAGE, MAX_HEADER)
    if header is None and source.left <= MAX_HEADER:
        source.at = len(source.text)  # the answer was cut within a header
        return None
    return header or ""


def _body(
    source: AnswerSource, of: AnswerCalls | type[TextPiece] | type[Thought], *, behind: bool = False
) -> Reader[None]:
    """Tell a body; behind: one of its kind came before, from which it is parted."""
    known = marks(END, RETURN, CALL, START)
    begun = False
    while True:
        found = known.find(source)
        if text := source.take(found.start() if found else known.certain(source)):
            begun = True
            yield _piece(of, f"\n{text}" if behind else text)
            behind = False
        if found or source.ended:
            source.at = found.end() if found else source.at
            break
        source.forget()
        yield None
    if isinstance(of, AnswerCalls) and not begun:
        yield of.more("{}")


def _piece(of: AnswerCalls | type[TextPiece] | type[Thought], text: str) -> Piece:
    return of.more(text) if isinstance(of, AnswerCalls) else of(text)


def _harmony(tools: Sequence[OfferedTool], spelling: Spelling, several: bool) -> CallGrammar:
    del several  # a call ends the answer
    each = [
        f"{spelling(f'commentary to={FUNCTIONS}{tool.name} {CONSTRAIN}json{MESSAGE}')} {json_of(tool.schema)}"
        for tool in tools
    ]
    return CallGrammar(CHANNEL, either(each))


def call_by_call(messages: Sequence[Message]) -> list[Message]:
    """Return turns of one call each, what came of it behind it: gpt-oss's template shows the first alone.

    It calls reasoning `thinking`, and takes it beside a call without content only.
    """
    return list(_call_by_call(messages))


def _call_by_call(messages: Sequence[Message]) -> Iterator[Message]:
    at = 0
    while at < len(messages):
        message, at = messages[at], at + 1
        calls = message.get("tool_calls") or ()
        if not calls:
            yield message
            continue
        end = at
        while end < len(messages) and messages[end]["role"] == "tool":
            end += 1
        answers, at = list(messages[at:end]), end
        for nth, call in enumerate(calls):
            yield _of_call(message, call, first=not nth)
            own = [each for each in answers if each.get("tool_call_id") == call.get("id")]
            yield from own
            answers = [each for each in answers if each not in own]
        yield from answers


def _of_call(message: Message, call: Mapping[str, Any], *, first: bool) -> Message:
    own = {**message, "tool_calls": [call]}
    if not first:
        own |= {"content": ""}
    elif message.get("reasoning") and not message.get("content"):
        own |= {"thinking": message["reasoning"]}
    return own


HARMONY: Final = ToolFormat(
    ToolParser.HARMONY,
    (TemplateMarks(("<|channel|>", "<|message|>")),),
    lambda _: {},  # all of an answer is messages
    _harmony,
    tokens=MARKS,
    turns=call_by_call,
)
