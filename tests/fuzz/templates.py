"""Chat templates drawn from all statements, filters and attributes, and what the sandbox answers to them."""

import json
import re
from contextlib import suppress
from random import Random
from typing import Any, Final

from jinja2 import TemplateSyntaxError

from inference_service.text.sandbox.loop import MAX_ANSWER_BYTES
from inference_service.text.sandbox.process import SandboxProcess, read_answer
from inference_service.text.sandbox.templates import MAX_CHARS, environment
from tests.fuzz.mutate import TEXTS, mutations
from tests.support.cases import cases

SOURCES, STATEMENTS, EXPRESSIONS = (cases(__file__, name) for name in ("SOURCES", "STATEMENTS", "EXPRESSIONS"))
HOLE: Final = re.compile("@")
DEPTH: Final = 5
VARIABLES: Final[dict[str, Any]] = {
    "messages": [{"role": "user", "content": "What's <there>?"}, {"role": "tool", "content": None}],
    "tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}],
    "documents": None,
    "add_generation_prompt": True,
    "x": [1, "a", 2.5],
    "bos_token": "<s>",
}
ANSWERS: Final = (b'{"text": "hi"}\n', b'{"error": "no"}\n', b'{"grammar": "{}", "text": ""}\n', b"{}\n")
_PATH: Final = re.compile(r"/(usr|home|root|work|tmp|opt|lib)[\w./-]*/|\.py\b")
CPU_S: Final = 0.5


def seeds() -> list[bytes]:
    """Return templates as families have them."""
    return [source.encode() for source in SOURCES]


def drawn(rng: Random) -> bytes:
    """Return one to four statements, half of the time within a template as families have it."""
    made = "".join(_filled(rng.choice(STATEMENTS), rng, DEPTH) for _ in range(rng.choice((1, 1, 2, 4))))
    if rng.random() < 0.5:
        source = rng.choice(SOURCES)
        at = rng.randrange(len(source) + 1)
        made = source[:at] + made + source[at:]
    data = made.encode("utf-8", "surrogatepass")
    return mutations(data, rng) if rng.random() < 0.2 else data


def _filled(form: str, rng: Random, depth: int) -> str:
    """Return a form whose holes are filled with expressions; a body of a statement may be one too."""

    def fill(_: re.Match[str]) -> str:
        below = EXPRESSIONS if depth > 0 else EXPRESSIONS[:30]
        return _filled(rng.choice(below), rng, depth - 1)

    return HOLE.sub(fill, form)


class TemplateJudge:
    """A sandbox of templates, which is the process that replicas have."""

    def __init__(self) -> None:
        self._process = SandboxProcess("templates", cpu_s=CPU_S)
        self._parse = environment().parse

    def __call__(self, data: bytes) -> str:
        """Ask for a rendering: it is a text of bounded length, or an error that names no path.

        What has no bound is outside: the parser is called here too, where a coverage-guided fuzzer sees it.
        """
        source = data.decode("utf-8", "replace")
        with suppress(TemplateSyntaxError, RecursionError):
            self._parse(source)
        answer = self._process.ask({"source": source, "variables": VARIABLES})
        [(word, text)] = answer.items()
        if word == "text":
            assert len(text) <= MAX_CHARS
            return "accepted"
        assert word == "error"
        assert text
        assert not _PATH.search(text.replace(source, "")), text
        assert "does not start" not in text, text
        assert "something else" not in text, text
        return "refused"

    def close(self) -> None:
        """End the process."""
        self._process.close()


def drawn_answer(rng: Random) -> bytes:
    """Return a line that is nearly an answer."""
    text = json.dumps({rng.choice(("text", "error", "")): rng.choice((*TEXTS, 1, None, ["a"]))})
    return mutations(rng.choice((text.encode() + b"\n", *ANSWERS)), rng)


def judge_answer(data: bytes) -> str:
    """Read a line as the service does: an answer is one that it could write to a client, and nothing else."""
    answer = read_answer(data)
    if answer is None:
        return "refused"
    assert len(data) <= MAX_ANSWER_BYTES
    for word, text in answer.items():
        assert isinstance(text, str)
        f"{word}{text}".encode()
    assert read_answer(json.dumps(answer).encode() + b"\n") == answer
    return "accepted"
