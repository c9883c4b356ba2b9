"""``loramux check --for``: what other programs make of an adapter, by rules; none of them is started."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer

from loramux.cli import shell
from loramux.cli.documents import emit
from loramux.cli.exits import Exit
from loramux.records import AdapterReport
from loramux.servers.documents import MAX_NAMED, junit, sarif, verdict_fields
from loramux.servers.facts import PICKLED, Facts, Remote, header_files, read_facts
from loramux.servers.forms import FailOn, Format
from loramux.servers.verdicts import Outcome, Server, Verdict, judge, servers
from loramux_shared.adapter_files import CONFIG, MODEL_CONFIG, weight_files
from loramux_shared.bases.files import GGUF_SUFFIX
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import RepoNotFound, SettingsInvalid
from loramux_shared.wording import listed

if TYPE_CHECKING:
    from loramux.cli.check_fix import FixedAdapter
    from loramux_shared.sources.base import Resolved, Source
    from loramux_shared.sources.open import Sources

OURS: Final = "loramux"
_SILENT: Final = frozenset({Outcome.IGNORED, Outcome.OTHER})
FAILING: Final = {
    FailOn.NEVER: frozenset[Outcome](),
    FailOn.IGNORED: _SILENT,
    FailOn.REFUSED: _SILENT | {Outcome.REFUSED},
    FailOn.UNKNOWN: _SILENT | {Outcome.REFUSED, Outcome.UNKNOWN},
}


@dataclass(frozen=True)
class Question:
    """An adapter, and the servers that it is meant for."""

    adapter: Repository
    base: Repository | None
    names: tuple[str, ...]
    max_rank: int
    report: Callable[[], AdapterReport] | None
    """Asks a builder; None without a base."""
    sources: "Sources | None" = None
    """The sources of adapters that are no folders here; None: all that are installed."""


def server_names(words: str) -> tuple[str, ...]:
    """Return the servers of a list with commas; raise SettingsInvalid for one that there are no rules for."""
    names = tuple(dict.fromkeys(word.strip().lower() for word in words.split(",")))
    if unknown := sorted(set(names) - set(servers())):
        raise SettingsInvalid(f"--for: expected {', '.join(servers())}, found {', '.join(unknown)!r}")
    return names


def tell_verdicts(
    question: Question, form: Format, fail_on: FailOn, fixed: "FixedAdapter | None" = None
) -> None:
    """Print what was fixed, and what each server makes of an adapter.

    The exit code is 1 where nothing could be fixed, or a verdict is among those to fail on.
    """
    verdicts = verdicts_of(question)
    label = question.adapter.label
    if fixed is not None and form is not Format.JSON:
        fixed.show(shell.show if form is Format.TEXT else shell.say)
    match form:
        case Format.JSON:
            fix = {} if fixed is None else {"fix": fixed.fields}
            emit({"adapter": label, **fix, "verdicts": [verdict_fields(verdict) for verdict in verdicts]})
        case Format.SARIF:
            typer.echo(sarif(_path_from_here(question.adapter), verdicts, version("loramux")))
        case Format.JUNIT:
            typer.echo(junit(label, verdicts))
        case Format.TEXT if verdicts:
            show_verdicts(verdicts)
    if (fixed is not None and fixed.findings) or any(
        verdict.outcome in FAILING[fail_on] for verdict in verdicts
    ):
        raise typer.Exit(Exit.FAILED)


def _path_from_here(adapter: Repository) -> str:
    """Return an adapter's folder as a path below this one, where it is, as pages of code name files."""
    if adapter.source is SourceKind.LOCAL and Path(adapter.repo).is_relative_to(Path.cwd()):
        return Path(adapter.repo).relative_to(Path.cwd()).as_posix()
    return adapter.label


def verdicts_of(question: Question) -> list[Verdict]:
    """Return the verdict of each server."""
    facts = None
    found = []
    for name in question.names:
        if name == OURS:
            found.append(own_verdict(servers()[OURS], question.report))
            continue
        facts = facts or facts_of(question)
        found.append(judge(name, facts))
    return found


def own_verdict(server: Server, report: Callable[[], AdapterReport] | None) -> Verdict:
    """Return what a builder says; it needs a base."""
    if report is None:
        fix = "Name the base with --base."
        return Verdict(server, Outcome.UNKNOWN, "a build compares every tensor with the base", fix)
    found = report()
    if found.accepted:
        return Verdict(server, Outcome.EXACT, how=server.how)
    first = next(each for each in found.findings if not each.code.startswith("W_"))
    why = f"{first.code} {first.where}: expected {first.expected}, found {first.found}"
    return Verdict(server, Outcome.REFUSED, why, first.fix, first.code, server.how)


def facts_of(question: Question) -> Facts:
    """Return what an adapter's files say: their headers alone, of a folder here or of the hub."""
    with tempfile.TemporaryDirectory(prefix="loramux-check-") as scratch:
        folder, remote = _adapter_of(question, Path(scratch))
        base = question.base
        config = _folder_of(base, Path(scratch) / "base", question) if base else None
        return read_facts(folder, question.max_rank, config, remote)


def _adapter_of(question: Question, scratch: Path) -> tuple[Path, Remote | None]:
    """Return a folder with an adapter's config, and with its weights where its source has no headers for us."""
    if question.adapter.source is SourceKind.LOCAL:
        if not (folder := _local(question.adapter)).is_dir():
            fix = "Write one from the file: --base BASE --fix FOLDER"
            raise RepoNotFound(f"LOCAL {folder}: expected a folder of PEFT for --for, found a file. {fix}.")
        return folder, None
    from loramux_shared.sources.hub import HubSource

    with _resolved(question.adapter, question) as (source, resolved):
        files = frozenset(resolved.files)
        if not isinstance(source, HubSource):
            source.fetch(resolved, sorted(files & {CONFIG, *weight_files(files)} - {*PICKLED}), scratch)
            return scratch, Remote(files)
        source.fetch(resolved, sorted(files & {CONFIG}), scratch)
        headers = [source.shapes(resolved, name) for name in header_files(files)]
        readable = [shapes for shapes in headers if shapes is not None]
        shapes = {key: shape for each in readable for key, shape in each.items()}
        return scratch, Remote(files, True, shapes if headers and len(readable) == len(headers) else None)


def _folder_of(base: Repository, into: Path, question: Question) -> Path:
    """Return a folder with a base's config."""
    if base.source is SourceKind.LOCAL:
        return _local(base)
    into.mkdir()
    with _resolved(base, question) as (source, resolved):
        source.fetch(resolved, sorted({MODEL_CONFIG} & resolved.files.keys()), into)
    return into


def _local(repository: Repository) -> Path:
    folder = Path(repository.repo) / repository.subfolder
    if not folder.is_dir() and folder.suffix != GGUF_SUFFIX:
        raise RepoNotFound(f"LOCAL {folder}: no such folder on this machine")
    return folder


@contextmanager
def _resolved(repository: Repository, question: Question) -> Iterator[tuple["Source", "Resolved"]]:
    """Yield a repository's source and its listing."""
    from loramux_shared.sources.open import open_sources

    source = (question.sources or open_sources()).of(repository)
    resolved = source.resolve(repository)
    try:
        yield source, resolved
    finally:
        resolved.close()


def show_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Print a table, then what is wrong and how to cure it."""
    rows = [(each.server.title, each.server.version, each.text, each.how or "-") for each in verdicts]
    shell.table(("server", "version", "verdict", "known by"), rows)
    for verdict in verdicts:
        if verdict.outcome is Outcome.EXACT:
            continue
        shell.show()
        shell.show(
            f"{verdict.server.title}: {verdict.text}",
            "yellow" if verdict.outcome is Outcome.UNKNOWN else "bold red",
        )
        named = listed(verdict.keys, MAX_NAMED, none="")
        for name, value in (
            ("why", verdict.why),
            ("tensors", named),
            ("fix", verdict.fix),
            ("source", verdict.source),
        ):
            if value:
                shell.show(f"  {name:<8} {value}")
