"""Adapters' tokenizers beside the base's: they may have more tokens, but none that means something else."""

import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from builder_service.domain import tokens
from builder_service.domain.rules.checked import ComparedTokens
from builder_service.domain.sandbox import Bounds, TooCostly, ask
from loramux_shared.adapter_files import TOKEN_FILES
from loramux_shared.bundle.added_tokens import AddedToken
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.faults import Finding

BOUNDS: Final = Bounds(cpu_s=15.0, memory_bytes=1 << 30)
"""For two tokenizers of 262,144 tokens, of 33 MB each, it takes 2 s and 0.4 GB."""
_FIX: Final = (
    "Tokens that add_tokens adds to the base's own tokenizer are served: train with those, or merge the "
    "adapter (merge_and_unload). Where it never uses them (padding), remove the tokenizer's files."
)


class BaseTokens:
    """Compares tokenizers with that of a recorded base; safe for several threads."""

    def __init__(self, files: Mapping[str, FileDigest], fetch: Callable[[str], Path], vocab: int) -> None:
        self._files = {name: files[name] for name in TOKEN_FILES if name in files}
        self._fetch = fetch
        self._vocab = vocab
        self._lock = threading.Lock()
        self._found: dict[frozenset[tuple[str, str]], ComparedTokens] = {}

    def compare(self, folder: Path, files: Mapping[str, FileDigest]) -> ComparedTokens:
        """Return how the tokenizer among an adapter's files differs from the base's.

        Raises:
            Fault: what the base's source raises.
        """
        own = {
            name: files[name] for name in TOKEN_FILES if name in files and files[name] != self._files.get(name)
        }
        key = frozenset((name, file.sha256) for name, file in own.items())
        with self._lock:  # of adapters with the same tokenizer, the others wait for the first
            if key not in self._found:
                self._found[key] = (
                    self._compare({name: folder / name for name in own}) if own else ComparedTokens()
                )
            return self._found[key]

    @cached_property
    def last(self) -> int:
        """The base's last token; its last id, where its tokens are not known.

        Raises:
            Fault: what the base's source raises.
        """
        try:
            return int(self._ask({})["last"])
        except TooCostly:
            return self._vocab - 1

    def _ask(self, own: Mapping[str, Path]) -> dict[str, Any]:
        question = {
            "adapter": {name: str(path) for name, path in own.items()},
            "base": {name: str(self._fetch(name)) for name in self._files},
            "vocab": self._vocab,
        }
        answer: dict[str, Any] = ask(tokens, question, BOUNDS)
        return answer

    def _compare(self, own: Mapping[str, Path]) -> ComparedTokens:
        try:
            answer = self._ask(own)
        except TooCostly as error:
            return ComparedTokens((_unreadable(", ".join(own), f"what is read in {BOUNDS}", f"{error}"),))
        found = [_unreadable(name, "a tokenizer", why) for name, why in answer["unreadable"].items()]
        found += [_others(name, **others) for name, others in answer["others"].items()]
        return ComparedTokens(tuple(found), tuple(AddedToken(**each) for each in answer["added"]))


def _unreadable(name: str, expected: str, found: str) -> Finding:
    fix = "Save the tokenizer again, or remove the file: the base's is used."
    return Finding(code="E_BAD_TEXT", where=name, expected=expected, found=found, fix=fix)


def _others(name: str, count: int, examples: list[str]) -> Finding:
    more = f" and {count - len(examples)} more" if count > len(examples) else ""
    return Finding(
        code="E_EMBED",
        where=name,
        expected="tokens of the base, by its ids, and new ones after its last",
        found=f"{', '.join(examples)}{more}",
        fix=_FIX,
    )
