"""Grammars of tests: a function of the tokens before gives the allowed tokens."""

from collections.abc import Callable, Collection, Sequence


class ScriptedGrammar:
    """A grammar that never ends."""

    complete = False
    failure = ""

    def __init__(self, allowed: Callable[[Sequence[int]], Collection[int]]) -> None:
        """Take what may come behind some tokens of an answer."""
        self._allowed = allowed
        self._tokens: list[int] = []
        self._drafted: list[int] = []

    def mask(self, ahead: int = 0) -> bytes:
        """Return the allowed tokens, as a mask that is no longer than it must be."""
        return mask_of(self._allowed([*self._tokens, *self._drafted[:ahead]]))

    def forced(self) -> list[int]:
        return []

    def draft(self, tokens: Sequence[int]) -> int:
        """Return the number of drafted tokens before the first one that is not allowed."""
        self._drafted = []
        for token in tokens:
            if token not in self._allowed([*self._tokens, *self._drafted]):
                break
            self._drafted.append(token)
        return len(self._drafted)

    def accept(self, token: int) -> None:
        """Append a token, and drop the draft."""
        self._tokens.append(token)
        self._drafted = []


def allow_only(*tokens: int) -> ScriptedGrammar:
    return ScriptedGrammar(lambda _: tokens)


def mask_of(tokens: Collection[int]) -> bytes:
    """Return tokens as a mask."""
    return sum(1 << token for token in set(tokens)).to_bytes(max(tokens, default=0) // 8 + 1, "little")
