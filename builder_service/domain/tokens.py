"""Which tokens an adapter's tokenizer has that the base's does not mean; asked by `sandbox`.

Nothing but the standard library here, see `sandboxed`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

SHOWN: Final = 5
_ID: Final = re.compile(r"[0-9]{1,9}")


class NoTokens(Exception):
    """A file that is no tokenizer; the text says why."""


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"unreadable": {file: why}, "others": {file: {"count", "shown"}}}``.

    The question has ``adapter`` and ``base``, paths by names of files, and ``vocab``, the number of ids of the
    base. Others are tokens that the base does not have, or has under another id; of a base whose tokens are
    not known, those beyond its ids.
    """
    known: dict[str, int] = {}
    for name, path in question["base"].items():
        try:
            known |= _tokens(name, path)
        except NoTokens:
            known = {}
            break
    found: dict[str, Any] = {"unreadable": {}, "others": {}}
    for name, path in question["adapter"].items():
        try:
            tokens = _tokens(name, path)
        except NoTokens as error:
            found["unreadable"][name] = str(error)[:200]
            continue
        others = [
            (number, token)
            for token, number in tokens.items()
            if (known.get(token) != number if known else number >= question["vocab"])
        ]
        if others:
            found["others"][name] = {"count": len(others), "shown": list(_shown(others, known))}
    return found


def _shown(others: list[tuple[int, str]], known: Mapping[str, int]) -> Iterable[str]:
    names = {number: token for token, number in known.items()}
    for number, token in sorted(others)[:SHOWN]:
        used = f", which is {_text(names[number])} in the base" if number in names else ""
        yield f"{_text(token)} (id {number}{used})"


def _text(token: str) -> str:
    return token[:40].encode("utf-8", "replace").decode()


def _tokens(name: str, path: str) -> dict[str, int]:
    """Return ids by token of one of the files that tokenizers are saved as.

    Raises:
        NoTokens: it says something else.
    """
    try:
        value = json.loads(Path(path).read_bytes())
    except RecursionError as error:
        raise NoTokens("nested too deeply") from error
    except ValueError as error:
        raise NoTokens(f"no valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise NoTokens("expected an object")
    match name:
        case "added_tokens.json":
            tokens = list(value.items())
        case "tokenizer_config.json":
            tokens = [
                (_of(entry, "content"), int(number) if _ID.fullmatch(number) else None)
                for number, entry in _items(value, "added_tokens_decoder")
            ]
        case _:
            added = value.get("added_tokens") or []
            if not isinstance(added, list):
                raise NoTokens("expected added_tokens as a list")
            tokens = [*_vocabulary(value), *((_of(entry, "content"), _of(entry, "id")) for entry in added)]
    if not all(isinstance(token, str) and type(number) is int and number >= 0 for token, number in tokens):
        raise NoTokens("expected tokens with ids")
    return dict(tokens)


def _vocabulary(tokenizer: Mapping[str, Any]) -> Iterable[tuple[Any, Any]]:
    """Return the tokens of ``tokenizer.json`` itself: ids by token, or pieces with scores in their order."""
    model = tokenizer.get("model") or {}
    if not isinstance(model, dict):
        raise NoTokens("expected model as an object")
    vocab = model.get("vocab") or {}
    if isinstance(vocab, list):
        return [(entry[0] if isinstance(entry, list) and entry else None, at) for at, entry in enumerate(vocab)]
    return _items(model, "vocab")


def _items(value: Mapping[str, Any], field: str) -> Iterable[tuple[str, Any]]:
    found = value.get(field) or {}
    if not isinstance(found, dict):
        raise NoTokens(f"expected {field} as an object")
    return found.items()


def _of(entry: Any, field: str) -> Any:
    return entry.get(field) if isinstance(entry, dict) else None
