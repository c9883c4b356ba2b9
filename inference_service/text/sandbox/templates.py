"""``python -m inference_service.text.sandbox.templates``: renders chat templates as Hugging Face does.

Question: ``{"source": ..., "variables": {...} or null}`` (null: only compile); answer: ``{"text": ...}`` or
``{"error": why}``.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from inference_service.text.sandbox.loop import serve

MAX_CHARS: Final = 8 * 1024 * 1024
"""Most characters of a rendered prompt."""
MAX_CACHED_CHARS: Final = 1 << 16
"""Longest template that stays compiled, in 15 bytes a character: long ones would take the memory of others."""


class GenerationTag(Extension):
    """Takes ``{% generation %}``, with which templates mark what a training learns, for its content."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the content of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class SafeNamespace(Namespace):
    """A namespace without underscored names."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, fields = args[0], dict(*args[1:], **kwargs)
        for name in fields:
            _check_name(name)
        Namespace.__init__(self, fields)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no {name!r}")


def environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that Hugging Face's templates are written for."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    env.globals["namespace"] = SafeNamespace
    return env


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def compiler() -> Callable[[str], jinja2.Template]:
    """Return what compiles a template, or gives the one that it compiled before."""
    fresh = environment().from_string
    cached = lru_cache(maxsize=64)(fresh)
    return lambda source: (fresh if len(source) > MAX_CACHED_CHARS else cached)(source)


def answer(
    compiled: Callable[[str], jinja2.Template], source: str, variables: Mapping[str, Any] | None
) -> dict[str, str]:
    """Compile a template, and render it where there are variables."""
    try:
        template = compiled(source)
        text = "" if variables is None else template.render(**variables)
        text.encode()  # a template, or the JSON in a message, can spell half a character
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a template's own code raises, and so do filters that it calls
        return {"error": f"{error}"[:500].encode(errors="replace").decode() or type(error).__name__}
    if len(text) > MAX_CHARS:
        return {"error": f"the prompt has {len(text)} characters, at most {MAX_CHARS}"}
    return {"text": text}


def main() -> None:
    """Answer until stdin ends; what Python thinks of a template's code is not for the server's log."""
    warnings.simplefilter("ignore")
    compiled = compiler()
    serve(lambda question: answer(compiled, question["source"], question["variables"]))


if __name__ == "__main__":
    main()
