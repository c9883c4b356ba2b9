"""Calls as JSON objects, read as they come: ``{"name": "f", "arguments": {...}}``, one or several.

Once name and the beginning of the arguments were read, it is a call: its arguments are emitted as the model
writes them, wrong ones too. What is no object of this kind, or calls another function, is none.
"""

import json
import re
from typing import Final

from inference_service.api.chat.formats.reading import AnswerSource, Block, Reader
from inference_service.api.chat.request import AnswerCalls

ARGUMENTS: Final = frozenset({"arguments", "parameters"})
"""Llama says parameters, all others arguments."""
MAX_HELD: Final = 256 * 1024
"""Characters of a value that is held until it is whole."""
_STRUCTURE: Final = re.compile(r'["{}\[\]]')
_IN_STRING: Final = re.compile(r'["\\]')
_SCALAR: Final = re.compile(r"[^\s,\]};]{1,64}")


def list_of_calls(calls: AnswerCalls, *ends: str) -> Block:
    """Return the reader of calls as JSON, behind which one of some marks may stand."""

    def read(source: AnswerSource) -> Reader[bool]:
        yield from source.spaces()
        if not (yield from json_calls(source, calls)):
            return False
        yield from source.spaces()
        for end in ends:
            if (yield from source.literal(end)):
                break
        return True

    return read


def json_calls(source: AnswerSource, calls: AnswerCalls) -> Reader[bool]:
    """Read one call, several behind each other, or a list of them; say whether there was any.

    What follows the last call, but for its closing bracket, is left.
    """
    listed = yield from source.literal("[")
    called = False
    while True:
        yield from source.spaces()
        before = source.at
        another = not called or (yield from _separator(source))
        if not another or not (yield from json_call(source, calls)):
            source.at = before
            break
        called = True
    if called and listed:
        yield from source.literal("]")
    return called


def _separator(source: AnswerSource) -> Reader[bool]:
    """Read what stands between two calls; say whether another one may follow."""
    if (yield from source.literal(",")) or (yield from source.literal(";")):
        yield from source.spaces()
    return source.text.startswith("{", source.at)


def json_call(source: AnswerSource, calls: AnswerCalls) -> Reader[bool]:
    """Read an object that is a call; return whether it was one, as far as that was emitted."""
    if not (yield from source.literal("{")):
        return False
    call = _CallReader(source, calls)
    while True:
        yield from source.spaces()
        if (yield from source.literal(",")):
            continue
        if (yield from source.literal("}")):
            yield from call.end()
            break
        if not (yield from call.read_entry()):
            break
    return call.emitted


class _CallReader:
    """Reads the entries of one call, and emits it as soon as its name and its arguments are known."""

    def __init__(self, source: AnswerSource, calls: AnswerCalls) -> None:
        self.emitted = False
        self._source = source
        self._calls = calls
        self._name: str | None = None
        self._arguments: str | None = None
        """Arguments that stood before the name."""

    def read_entry(self) -> Reader[bool]:
        """Read a key and its value; return whether the object may still be a call."""
        source = self._source
        key = yield from json_string(source)
        yield from source.spaces()
        if key is None or not (yield from source.literal(":")):
            return False
        yield from source.spaces()
        if key == "name" and self._name is None:
            return (yield from self._read_name())
        if key in ARGUMENTS and self._name is not None and not self.emitted:
            yield self._calls.begin(self._name)
            self.emitted = True
            yield from json_arguments(source, self._calls)
            return True
        value = yield from _held_value(source)
        if key in ARGUMENTS and self._arguments is None:
            self._arguments = value
        return value is not None

    def _read_name(self) -> Reader[bool]:
        """Read the name; return whether a function of this name was offered."""
        name = yield from json_string(self._source)
        if name is None or name not in self._calls.offered:
            return False
        self._name = name
        if self._arguments is not None:
            yield from self._emit(name, self._arguments)
        return True

    def end(self) -> Reader[None]:
        """Emit a call whose object had no arguments."""
        if self._name is not None and not self.emitted:
            yield from self._emit(self._name, "{}")

    def _emit(self, name: str, arguments: str) -> Reader[None]:
        yield self._calls.begin(name)
        yield self._calls.more(arguments)
        self.emitted = True


def json_arguments(source: AnswerSource, calls: AnswerCalls) -> Reader[None]:
    """Tell the arguments of a call that has begun, piece by piece."""
    while not source.left and not source.ended:
        yield None
    if source.text.startswith(("{", "["), source.at):
        yield from _structure(source, calls)
    elif source.left:
        value = yield from _held_value(source)
        if value is not None:
            yield calls.more(value)


def _held_value(source: AnswerSource) -> Reader[str | None]:
    """Return a value when it is whole, as arguments: a string is what it says, and null is no arguments.

    None: it is not whole, or too long to be held.
    """
    if source.text.startswith('"', source.at):
        return (yield from json_string(source))
    if source.text.startswith(("{", "["), source.at):
        begin = source.at
        whole = yield from _structure(source, None)
        return source.text[begin : source.at] if whole else None
    found = yield from source.match(_SCALAR)
    return "{}" if found is None or found[0] == "null" else found[0]


def _structure(source: AnswerSource, calls: AnswerCalls | None) -> Reader[bool]:
    """Read an object or a list, tell calls of it as it comes, and say whether its last bracket came."""
    brackets, held = _Brackets(), 0
    while True:
        begin = source.at
        source.at = brackets.follow(source)
        if calls is None:
            held += source.at - begin
            if held > MAX_HELD:
                return False
        elif source.at > begin:
            yield calls.more(source.text[begin : source.at])
            source.forget()
        if brackets.closed or source.ended:
            return brackets.closed
        yield None


class _Brackets:
    """Brackets that are open, strings apart."""

    def __init__(self) -> None:
        self.closed = False
        self._depth = 0
        self._in_string = False

    def follow(self, source: AnswerSource) -> int:
        """Return where the last bracket closes, else how far the text is certain."""
        place = source.at
        while found := (_IN_STRING if self._in_string else _STRUCTURE).search(source.text, place):
            place = found.end()
            match found[0]:
                case '"':
                    self._in_string = not self._in_string
                case "\\" if place == len(source.text):
                    return place if source.ended else found.start()
                case "\\":
                    place += 1
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
            if not self._depth:
                self.closed = True
                return place
        return len(source.text)


def json_string(source: AnswerSource) -> Reader[str | None]:
    """Read a string; None where there is none."""
    if not (yield from source.literal('"')):
        return None
    begin = place = source.at
    while True:
        found = yield from source.search(_IN_STRING, place, begin + MAX_HELD)
        if found is None:
            return None
        place = found.end() + (found[0] == "\\")
        if found[0] == '"':
            break
    if place - begin > MAX_HELD:
        return None
    source.at = place
    try:
        return str(json.loads(source.text[begin - 1 : place], strict=False))  # noqa: TID251 - one string, of MAX_HELD characters
    except ValueError:
        return None
