"""Grammars that mask tokens, from a constraint.

llguidance does the work: only `_question`, `_Tokens` and `_Matcher` know it.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from inference_service.core.constraint import Constraint, Grammar, Kind
from inference_service.driver.counts import REPEATS, too_many
from inference_service.text.sandbox.grammars import LIMITS
from inference_service.text.sandbox.process import SandboxProcess
from inference_service.text.text import Text
from loramux_shared.faults import Finding, RequestInvalid
from loramux_shared.rpc.stopping import shielded
from loramux_shared.untrusted_json import parse_json

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

CACHED: Final = 128
MAX_TOKENIZERS: Final = 8
"""Texts whose tokens are kept in the library's form: 150,000 take tens of MB."""
COMPILE_TIMEOUT_S: Final = 10.0
# Without a limit, an unsure model would write spaces until its tokens are spent.
JSON_OPTIONS: Final[JsonCompileOptions] = {"whitespace_pattern": r"\n?[ \t]{0,40}"}
SLICES: Final = [
    *LLTokenizer.general_slices(),
    *(r"[a-z]{1,10}", r"[a-zA-Z0-9]{1,10}", r" ?[a-z]{1,10}", r" ?[a-zA-Z0-9]{1,10}", r"[a-zA-Z0-9 ]{1,30}"),
]
"""Texts whose tokens a mask lets pass together where a grammar lets pass all of them: the library's own are for
strings of JSON, and a bounded repetition of letters took 40 times as long.
"""
_PLACE: Final = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")
"""Place of an error in a grammar, which lines of that follow."""
_EXPECTED: Final[Mapping[Kind, str]] = {
    "json_object": "an object",
    "json_schema": "a JSON schema of keywords that are supported",
    "regex": "a regular expression without look-around and backreferences",
    "lark": "a grammar in Lark",
    "gbnf": "a grammar in GBNF or Lark",
}
_IN_OUR_WORDS: Final = (
    (
        r"^NoExtensionBias",
        "no text at all: a rule or $ref leads only to itself, or its parts exclude each other",
    ),
    (r"^Unsatisfiable schema: Regex is empty.*", "a string that nothing fits: its keywords exclude each other"),
    (r"^oneOf constraints are not supported.*", "oneOf, which is not supported; use anyOf"),
    (
        r"^Resource '(.*?)' is not present in a registry.*",
        r"a reference to \1; it must lead into the schema itself",
    ),
    (r"^maximum recursion depth exceeded.*", "one that is too deeply nested"),
    (r"^at \d+\(\d+\): (.*?)\n   1 \| (?:start: /|%llguidance ).*", r"\1"),  # lines that are ours
    (r"\s*<non-verbose/>\s*$", ""),
)
"""Messages for clients, by the library's messages for its own developers."""


@dataclass(frozen=True)
class Compiled:
    """A constraint that any number of answers can begin with."""

    start: LLMatcher
    eos: int
    """The token that the library allows where the text may stop."""

    def begin(self, ends: frozenset[int], *, optional: bool = False) -> Grammar:
        """Return the grammar of a new answer; a token of ends may come where its text may stop.

        One that is optional allows everything from where it cannot follow the answer any further.
        """
        return _Matcher(self.start.deep_copy(), self.eos, ends, optional)


class Constraints:
    """Compiles constraints on a thread of its own, after a trial in a process, and keeps the recent ones."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos = min(eos_token_ids, default=0)
        self._matchers: OrderedDict[tuple[Constraint, Text], asyncio.Future[LLMatcher | str]] = OrderedDict()
        self._tokenizers: OrderedDict[Text, LLTokenizer] = OrderedDict()
        """The recent ones; on the thread alone."""
        self.trial = SandboxProcess("grammars")
        """Tries grammars, on the thread alone."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="constraints")

    async def compile(self, constraint: Constraint, text: Text) -> Compiled:
        """Return a compiled constraint on tokens of a text. Raise RequestInvalid, with its ``where``, for one
        that cannot be parsed, is not supported, or takes too long.
        """
        future = self._matchers.get((constraint, text))
        if future is None:
            question = _question(constraint)
            if found := too_many(constraint.kind, constraint.text):
                raise _refused(constraint, found, "Lower it, or repeat without a bound.", REPEATS)
            future = asyncio.get_running_loop().run_in_executor(self._thread, self._begin, question, text)
            self._matchers[constraint, text] = future
        self._matchers.move_to_end((constraint, text))
        while len(self._matchers) > CACHED:
            self._matchers.popitem(last=False)
        try:
            async with asyncio.timeout(COMPILE_TIMEOUT_S):
                start = await shielded(future)
        except TimeoutError:
            reason = f"not ready after {COMPILE_TIMEOUT_S:g} s"
            raise _refused(constraint, reason, "Simplify it, or retry.") from None
        if isinstance(start, str):
            raise _refused(constraint, start)
        return Compiled(start, self._eos)

    def _tokenizer(self, text: Text) -> LLTokenizer:
        if text not in self._tokenizers:
            self._tokenizers[text] = LLTokenizer(TokenizerWrapper(_Tokens(text, self._eos)), slices=SLICES)
        self._tokenizers.move_to_end(text)
        while len(self._tokenizers) > MAX_TOKENIZERS:
            self._tokenizers.popitem(last=False)
        return self._tokenizers[text]

    def _begin(self, question: Mapping[str, str], text: Text) -> LLMatcher | str:
        """Return the beginning of a grammar, or why there is none."""
        answer = {**question, **self.trial.ask(question)}
        if "error" in answer or "grammar" not in answer:  # none: the sandbox was taken over
            return _explained(answer.get("error", "its sandbox answered without a grammar"))
        start = LLMatcher(self._tokenizer(text), answer["grammar"], limits=LIMITS, log_level=0)
        start.compute_bitmask()  # makes the lexer's first states, which every answer needs
        return _explained(start.get_error()) or start


def _explained(error: str) -> str:
    for pattern, words in _IN_OUR_WORDS:
        error = re.sub(pattern, words, error, flags=re.DOTALL)
    return error


def _refused(
    constraint: Constraint, reason: str, fix: str = "Correct it.", expected: str = ""
) -> RequestInvalid:
    if constraint.composed:
        reason = _PLACE.sub("", reason).partition("\n")[0]
    expected = expected or _EXPECTED["json_schema" if constraint.composed else constraint.kind]
    finding = Finding(
        code="E_CONSTRAINT", where=constraint.where, expected=expected, found=reason[:500], fix=fix
    )
    what = "the tools are" if constraint.composed else "the response format is"
    return RequestInvalid(f"{what} refused.", [finding])


def _question(constraint: Constraint) -> Mapping[str, str]:
    """Return what the trial is asked: a grammar, or one that it has to translate or to put together first."""
    around = {"around": constraint.around} if constraint.around else {}
    return {**_language(constraint), **around}


def _language(constraint: Constraint) -> Mapping[str, str]:
    match constraint.kind:
        case "json_object":
            return {"grammar": LLMatcher.grammar_from_json_schema({"type": "object"}, defaults=JSON_OPTIONS)}
        case "json_schema":
            return {"grammar": _schema_grammar(constraint)}
        case "regex":
            return {"grammar": LLMatcher.grammar_from_regex(constraint.text)}
        case "lark":
            return {"grammar": LLMatcher.grammar_from_lark(constraint.text)}
        case "gbnf":
            return {"gbnf": constraint.text}


def _schema_grammar(constraint: Constraint) -> str:
    try:
        schema = parse_json(constraint.text)
        if isinstance(schema, dict | bool):
            return LLMatcher.grammar_from_json_schema(constraint.text, defaults=JSON_OPTIONS)
    except ValueError as error:
        raise _refused(constraint, f"the schema is not JSON: {error}") from error
    raise _refused(constraint, f"the schema is a {type(schema).__name__}", "Send an object.")


class _Tokens:
    """Our vocabulary as llguidance asks for it."""

    bos_token_id = None

    def __init__(self, text: Text, eos: int) -> None:
        self.eos_token_id = eos
        self.tokens = text.vocabulary.all_bytes
        self.special_token_ids = sorted(text.vocabulary.special)
        self._text = text
        self._ids = {spelled: token for token, spelled in enumerate(self.tokens) if spelled}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, piece: str) -> Sequence[int]:
        """Tokenize what a grammar leaves no choice about: as the model would, if that spells just the piece."""
        target = piece.encode()
        for mark in ("", "\x02"):  # behind a mark, no tokenizer puts a space before the first word
            ids = self._text.encode(mark + piece, add_special_tokens=False)
            for start in range(3):
                if b"".join(self.tokens[token] for token in ids[start:]) == target:
                    return ids[start:]
        return self._greedy(target)

    def _greedy(self, target: bytes) -> list[int]:
        """Take the longest token again and again, as far as there is one."""
        ids: list[int] = []
        at = 0
        while at < len(target):
            ends = range(min(len(target), at + self._longest), at, -1)
            end = next((end for end in ends if target[at:end] in self._ids), None)
            if end is None:
                break
            ids.append(self._ids[target[at:end]])
            at = end
        return ids


class _Matcher:
    """A `Grammar`: a token of ends may come where the text may stop, and no other special token ever."""

    def __init__(self, matcher: Any, eos: int, ends: frozenset[int], optional: bool) -> None:
        self._optional = optional
        self._matcher = matcher
        self._eos = eos
        self._ends = ends
        self._looks: list[_Look] = []
        """Masks of the next token, then behind each drafted token; empty until one is requested."""
        self._drafted: Sequence[int] = ()

    @property
    def complete(self) -> bool:
        """Return True if it is a whole text that nothing may follow, as far as was looked."""
        return bool(self._looks) and self._looks[0].complete

    @property
    def failure(self) -> str:
        """Why it cannot be followed any further, as far as was looked."""
        return self._looks[0].failure if self._looks else ""

    def mask(self, ahead: int = 0) -> bytes:
        """Return the tokens that may come next, or behind so many drafted ones."""
        return self._first.mask if not ahead else self._looks[ahead].mask

    def forced(self) -> list[int]:
        """Return the tokens that must come next."""
        may_go_on = not (self._first.failure or self._first.complete or self._matcher.is_error())
        return list(self._matcher.compute_ff_tokens()) if may_go_on else []

    def draft(self, tokens: Sequence[int]) -> int:
        """Return how many of these tokens may come with others behind them."""
        self._looks, ahead = [self._first], self._matcher.deep_copy()
        for token in tokens:
            may_come = self._looks[-1].mask[token // 8] >> token % 8 & 1
            if token in self._ends or not may_come or not ahead.consume_token(token):
                break
            look = self._look(ahead)
            if look.complete or look.failure or ahead.is_error():  # no token may follow this one
                break
            self._looks.append(look)
        self._drafted = tokens[: len(self._looks) - 1]
        return len(self._drafted)

    def accept(self, token: int) -> None:
        """Take the token that was chosen."""
        if token in self._ends or self.failure:
            return
        self._matcher.consume_token(token)
        if self._drafted and self._drafted[0] == token:
            self._looks, self._drafted = self._looks[1:], self._drafted[1:]
        else:
            self._looks, self._drafted = [self._look(self._matcher)], ()

    @property
    def _first(self) -> _Look:
        if not self._looks:
            self._looks = [self._look(self._matcher)]
        return self._looks[0]

    def _look(self, matcher: Any) -> _Look:
        """Look at what may come next, and whether the text is complete, or cannot be continued by any token."""
        error = matcher.get_error()
        failure = _explained(error) if error else ""
        may_stop = not failure and matcher.is_accepting()
        mask = bytearray(matcher.compute_bitmask())
        if failure and self._optional:
            return _Look(b"\xff" * len(mask), False, "")
        for token in (self._eos, *self._ends):
            mask[token // 8] &= ~(1 << token % 8)
        stuck = not np.frombuffer(mask, np.uint8).any()
        if stuck and not may_stop and not failure:
            failure = "no token of this model continues the text"
        if may_stop:
            for token in self._ends:
                mask[token // 8] |= 1 << token % 8
        return _Look(bytes(mask), may_stop and stuck, failure)


@dataclass(frozen=True, slots=True)
class _Look:
    """A grammar's answer at one place of the text; see `Grammar`."""

    mask: bytes
    complete: bool
    failure: str
