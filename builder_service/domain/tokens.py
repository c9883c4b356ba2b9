"""The tokens of an adapter's tokenizer that the base's lacks.

`sandbox` asks it; it uses nothing but the standard library, see `sandboxed`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

MAX_LISTED_TOKENS: Final = 5
MAX_ADDED_TOKENS: Final = 4096
"""Tokens that an adapter may add."""
MAX_TOKEN_CHARACTERS: Final = 256
"""Longest token."""
FLAGS: Final = ("special", "lstrip", "rstrip", "single_word", "normalized")
"""Fields of an added token in the tokenizers library beside its text and id; all of them are booleans."""
_ID: Final = re.compile(r"[0-9]{1,9}")

Others = list[tuple[int, str]]
"""Ids and tokens that the base does not mean by each other."""


class NoTokens(Exception):
    """A file that is no tokenizer; the text says why."""


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"unreadable": {file: why}, "others": {file: {count, examples}}, "added": [...], "last": N}``.

    The question has ``adapter`` and ``base``, paths by names of files, and ``vocab``, the number of ids of the
    base. Added are tokens behind the base's last one, as ``tokenizer.json`` has them, or else
    ``tokenizer_config.json``: an object with id, content and FLAGS each. Others are those that could not come
    so: of a base whose tokens are not known, those beyond its ids. Last is the base's last token, or its last
    id where its tokens are not known.
    """
    known: dict[str, int] = {}
    for name, path in question["base"].items():
        try:
            known |= tokens_of(name, read_object(path))
        except NoTokens:
            known = {}
            break
    last = max(known.values(), default=question["vocab"] - 1)
    found: dict[str, Any] = {"unreadable": {}, "others": {}, "added": [], "last": last}
    others: dict[str, Others] = {}
    flags: dict[str, dict[str, dict[str, bool]]] = {}
    for name, path in question["adapter"].items():
        try:
            value = read_object(path)
            tokens = tokens_of(name, value)
        except NoTokens as error:
            found["unreadable"][name] = str(error)[:200]
            continue
        flags[name] = _flags(name, value)
        others[name] = sorted(
            (number, token)
            for token, number in tokens.items()
            if (known.get(token) != number if known else number >= question["vocab"])
        )
    truth = "tokenizer.json" if "tokenizer.json" in others else "tokenizer_config.json"
    added = _added(others.get(truth, []), known, flags.get(truth, {}))
    found["added"] = added
    fresh = {(each["id"], each["content"]) for each in added}
    for name, those in others.items():
        if foreign := [each for each in those if each not in fresh]:
            found["others"][name] = {"count": len(foreign), "examples": list(_described(foreign, known))}
    return found


def _added(
    others: Others, known: Mapping[str, int], flags: Mapping[str, Mapping[str, bool]]
) -> list[dict[str, Any]]:
    """Return the tokens that the tokenizers library would number so if they were added to the base's."""
    first = 1 + max(known.values(), default=-1)
    numbers = [number for number, _ in others]
    fits = known and len(others) <= MAX_ADDED_TOKENS and numbers == [*range(first, first + len(others))]
    if not fits or not all(token not in known and token in flags and _fits(token) for _, token in others):
        return []
    return [{"id": number, "content": token, **flags[token]} for number, token in others]


def _fits(token: str) -> bool:
    return 0 < len(token) <= MAX_TOKEN_CHARACTERS and token == _text(token, MAX_TOKEN_CHARACTERS)


def _flags(name: str, value: Mapping[str, Any]) -> dict[str, dict[str, bool]]:
    """Return what a file says of its added tokens, by their texts."""
    match name:
        case "tokenizer_config.json":
            entries = [entry for _, entry in _items(value, "added_tokens_decoder")]
        case "tokenizer.json":
            entries = list(value.get("added_tokens") or [])
        case _:
            return {}
    declared = {_of(entry, "content"): {flag: _of(entry, flag) for flag in FLAGS} for entry in entries}
    return {
        token: flags
        for token, flags in declared.items()
        if all(isinstance(flag, bool) for flag in flags.values())
    }


def _described(others: Others, known: Mapping[str, int]) -> Iterable[str]:
    names = {number: token for token, number in known.items()}
    for number, token in others[:MAX_LISTED_TOKENS]:
        used = f", which is {_text(names[number])} in the base" if number in names else ""
        yield f"{_text(token)} (id {number}{used})"


def _text(token: str, most: int = 40) -> str:
    return token[:most].encode("utf-8", "replace").decode()


def read_object(path: str) -> dict[str, Any]:
    """Return the object in a file; raise NoTokens where there is something else."""
    try:
        value = json.loads(Path(path).read_bytes())  # noqa: TID251 - the sandbox bounds its memory
    except RecursionError as error:
        raise NoTokens("nested too deeply") from error
    except ValueError as error:
        raise NoTokens(f"invalid JSON ({error})") from error
    if not isinstance(value, dict):
        raise NoTokens("expected an object")
    return value


def tokens_of(name: str, value: Mapping[str, Any]) -> dict[str, int]:
    """Return ids by token of one of the files of a tokenizer; raise NoTokens where there is something else."""
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
