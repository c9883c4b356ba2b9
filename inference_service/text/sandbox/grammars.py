"""``python -m inference_service.text.sandbox.grammars``: tries constraints before the service takes them.

The library bounds the work of a token, but not that of the beginning: there are grammars of few bytes that take
minutes, or that overflow the stack. Question: ``{"grammar": ...}``; answer: ``{}`` or ``{"error": why}``.
A grammar in GBNF or Lark is asked as ``{"gbnf": ...}`` and answered as ``{"grammar": ...}``: its translator
has no bounds at all. What stands around such a text is ``{"around": ...}`` beside either.
"""

import json
import re
import threading
from collections.abc import Sequence
from typing import Any, Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

from inference_service.text.sandbox.loop import serve

# A fourth of what the service's threads have: what fits here fits there.
STACK_BYTES: Final = 2 * 1024 * 1024
LIMITS: Final = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
"""The library's own, which are about 20 ms to begin and 15 ms for a token, but fewer states (2 kB each)."""


_SPECIAL: Final = re.compile(r"<\[\d+\]>")


class Bytes:
    """A vocabulary of single bytes, for `TokenizerWrapper`."""

    bos_token_id = None
    eos_token_id = 256
    special_token_ids = (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"</s>")

    def __call__(self, text: str | bytes) -> Sequence[int]:
        """Tokenize."""
        return list(text.encode() if isinstance(text, str) else text)


def answer(tokenizer: LLTokenizer, grammar: str) -> dict[str, str]:
    """Begin a grammar, and look at what may come first; each special token is the one that there is here."""
    matcher = LLMatcher(tokenizer, _SPECIAL.sub("<[256]>", grammar), limits=LIMITS, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    error = matcher.get_error()
    return {"error": error} if error else {}


def translated(question: dict[str, Any]) -> dict[str, str]:
    """Return a question with a grammar of the library's own, or an error."""
    grammar = question.get("grammar", "")
    try:
        if "gbnf" in question:
            grammar = LLMatcher.grammar_from_lark(any_to_lark(question["gbnf"]))
        around = question.get("around")
        return {"grammar": put_into(around, grammar) if around else grammar}
    except Exception as error:  # noqa: BLE001 - the translator raises it itself, and whatever its mistakes raise
        return {"error": str(error) or type(error).__name__}


def put_into(around: str, grammar: str) -> str:
    """Return the grammar of some Lark in which another grammar is ``@answer``."""
    grammars = json.loads(grammar)["grammars"] if grammar.startswith("{") else [{"lark_grammar": grammar}]  # noqa: TID251 - the sandbox bounds its memory
    first, *others = grammars
    return json.dumps({"grammars": [{"lark_grammar": around}, {**first, "name": "answer"}, *others]})


def main() -> None:
    """Answer until stdin ends."""
    tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))

    def on_a_small_stack(question: dict[str, Any]) -> dict[str, str]:
        result: dict[str, str] = {}

        def look() -> None:
            result.update(translated(question))
            result.update(answer(tokenizer, result["grammar"]) if "grammar" in result else {})

        threading.stack_size(STACK_BYTES)
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return result

    serve(on_a_small_stack)


if __name__ == "__main__":
    main()
