"""Find refused words and names, and docstrings that are no sentences, by scripts/words.toml.

A word is found in documents, comments, messages and help texts, and as a part of an identifier.
With --count, print how often each word occurs, exceptions included.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RULES = tomllib.loads((ROOT / "scripts/words.toml").read_text())
_NODES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


class Match(NamedTuple):
    """One place that a rule refuses, with the rule's name and its cure."""

    path: str
    line: int
    rule: str
    cure: str
    exempt: bool


def words_in(path: str, text: str) -> Iterator[Match]:
    """Yield the refused words of a file; identifiers count as the words that they are made of."""
    text = _CAMEL.sub(" ", text.replace("_", " "))
    for word in RULES["word"]:
        phrase = word["not"].replace(" ", r"[\s#/*-]+")
        exempt = _covered(path, word.get("except", []))
        for found in re.finditer(rf"\b(?:{phrase})", text, re.IGNORECASE):
            yield Match(path, text.count("\n", 0, found.start()) + 1, word["not"], word["but"], exempt)


def fragments_in(path: str, text: str) -> Iterator[Match]:
    """Yield docstrings that begin with a refused word, or that end without a full stop."""
    rules = RULES["docstring"]
    exempt = _covered(path, rules["except"])
    for node in ast.walk(ast.parse(text)):
        doc = ast.get_docstring(node) if isinstance(node, _NODES) else None
        if not doc:
            continue
        first = doc.split("\n\n")[0]
        word = first.split()[0].strip("\"'`(,.")
        refused = word in rules["not_first"]
        if refused or first[-1] not in ".:!?`":
            cure = "a sentence: Return ..., A ..., The ..." if refused else "a full stop at the end"
            yield Match(path, getattr(node, "lineno", 1), f'docstring "{word} ..."', cure, exempt)


def names_in(path: str, text: str) -> Iterator[Match]:
    """Yield the variables, parameters, functions and classes whose whole name is refused."""
    rules = RULES["name"]
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                pass
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                pass
            case _:
                continue
        if name.strip("_").lower() in rules["not"]:
            yield Match(path, node.lineno, f"name {name}", rules["but"], _covered(path, rules["except"]))


def _covered(path: str, patterns: list[str]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def _matches() -> Iterator[Match]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S607
    for path in listed.stdout.split("\0"):
        if not _covered(path, RULES["files"]) or _covered(path, RULES["skipped"]):
            continue
        if not (ROOT / path).exists():  # a folder that was deleted, as extensions may be
            continue
        text = (ROOT / path).read_text()
        yield from words_in(path, text)
        if path.endswith(".py"):
            yield from fragments_in(path, text)
            yield from names_in(path, text)


def _refused(match: Match) -> str:
    return f"{match.path}:{match.line}: {match.rule}: write {match.cure}"


def main() -> None:
    """Print the matches and fail where there are any; or print counts."""
    matches: list[Match] = list(_matches())
    if "--count" in sys.argv:
        counts: Counter[Any] = Counter(match.rule for match in matches)
        refused = sum(not match.exempt for match in matches)
        print(*(f"{count:6} {rule}" for rule, count in counts.most_common()), sep="\n")  # noqa: T201
        print(f"{len(matches)} matches, {refused} of them without an exception")  # noqa: T201
    elif lines := [_refused(match) for match in matches if not match.exempt]:
        raise SystemExit("\n".join(lines))


if __name__ == "__main__":
    main()
