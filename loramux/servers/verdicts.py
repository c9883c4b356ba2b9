"""Verdicts: what each server makes of an adapter, by the rules."""

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import Any, Final

from loramux.servers.conditions import WHOLE, Keys, keys_of
from loramux.servers.facts import Facts
from loramux_shared.wording import counted


class Outcome(StrEnum):
    """The ways in which an adapter is taken, the best first."""

    EXACT = "exact"
    UNKNOWN = "unknown"
    IGNORED = "ignored"
    OTHER = "other"
    REFUSED = "refused"


@dataclass(frozen=True)
class Server:
    """A program that serves adapters, at the version that the rules are about."""

    name: str
    title: str
    version: str
    how: str
    """``run`` or ``read``."""


@dataclass(frozen=True)
class Rule:
    """A row of the rules, for one server."""

    conditions: tuple[tuple[str, ...], ...]
    outcome: Outcome
    why: str
    fix: str
    source: str
    how: str


@dataclass(frozen=True)
class Verdict:
    """One server's treatment of an adapter."""

    server: Server
    outcome: Outcome
    why: str = ""
    fix: str = ""
    source: str = ""
    how: str = ""
    """``run`` or ``read``: how the rule that decided is known."""
    keys: tuple[str, ...] = ()
    """Tensors that the verdict is about."""
    tensors: int = 0
    """Tensors of the adapter."""

    @property
    def text(self) -> str:
        """Return the verdict in words."""
        match self.outcome:
            case Outcome.EXACT:
                return "serves it exactly"
            case Outcome.REFUSED:
                return "refuses it"
            case Outcome.OTHER:
                return "serves something else"
            case Outcome.IGNORED:
                whole = "all" if len(self.keys) == self.tensors else str(len(self.keys))
                return f"loads it and ignores {whole} of {counted(self.tensors, 'tensor')}"
        return "unknown"


@cache
def _table() -> Mapping[str, Any]:
    text = resources.files("loramux.servers").joinpath("rules.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@cache
def servers() -> Mapping[str, Server]:
    """Return the servers that there are rules for, by name."""
    return {name: Server(name, **fields) for name, fields in _table()["servers"].items()}


@cache
def rules_of(server: str) -> tuple[Rule, ...]:
    """Return the rules about a server, in their order."""
    how = servers()[server].how
    return tuple(_rule(row, server, how) for row in _table()["rules"] if server in row["servers"])


def _rule(row: Mapping[str, Any], server: str, how: str) -> Rule:
    """Return a row for one of its servers; a source with semicolons has a part for each of them."""
    conditions = tuple(tuple(_expand(each)) for each in row["if"])
    parts = row["source"].split("; ")
    source = parts[row["servers"].index(server)] if len(parts) == len(row["servers"]) else row["source"]
    return Rule(conditions, Outcome(row["verdict"]), row["why"], row["fix"], source, row.get("how", how))


def _expand(words: Iterable[str]) -> Iterator[str]:
    """Yield the words of a condition, patterns in place of their names."""
    for word in words:
        if word.startswith("$"):
            yield from _table()["patterns"][word[1:]]
        else:
            yield word


SEVERITY: Final = tuple(Outcome)


def judge(server: str, facts: Facts) -> Verdict:
    """Return what a server makes of an adapter: the worst of the rules that hold, else exact."""
    held = [(rule, keys) for rule in rules_of(server) if (keys := keys_of(rule.conditions, facts))]
    total = len(facts.keys)
    if not held:
        return Verdict(servers()[server], Outcome.EXACT, how=servers()[server].how, tensors=total)
    worst = max((rule.outcome for rule, _ in held), key=SEVERITY.index)
    rule = next(rule for rule, _ in held if rule.outcome is worst)
    named: Keys = frozenset().union(*(keys for each, keys in held if each.outcome is worst and keys != WHOLE))
    return Verdict(
        servers()[server], worst, rule.why, rule.fix, rule.source, rule.how, tuple(sorted(named)), total
    )
