"""``loramux gc``: what in a store nothing refers to, listed or removed."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Annotated, Final

import typer
from rich.filesize import decimal

from loramux.cli import shell
from loramux.cli.documents import emit
from loramux.cli.local.services import StoreFlag
from loramux_shared.bundle.orphans import (
    Orphan,
    RetainedGeneration,
    Retention,
    check_grace,
    find_orphans,
    remove,
)
from loramux_shared.faults import SettingsInvalid
from loramux_shared.settings import BuilderSettings, load_settings
from loramux_shared.storage.open import open_store
from loramux_shared.wording import counted, listed

_UNITS: Final = {"d": "days", "h": "hours", "m": "minutes", "s": "seconds"}


@shell.command
def gc(
    store: StoreFlag = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the listed objects.")] = False,
    grace: Annotated[
        str, typer.Option("--grace", metavar="TIME", help="Age below which objects stay: 24h, 7d, 30m.")
    ] = "24h",
    keep: Annotated[
        int | None,
        typer.Option("--keep", min=0, metavar="N", help="Generations to keep before the served one."),
    ] = None,
    keep_for: Annotated[
        str | None,
        typer.Option("--keep-for", metavar="TIME", help="Age up to which generations stay: 30d, 12h."),
    ] = None,
    as_json: shell.Json = False,
) -> None:
    """List what nothing in a store refers to, or remove it.

    Builds that were killed, failed at the end or were cancelled leave bundles that
    no generation refers to. What a generation refers to is never removed; without
    --keep and --keep-for all generations stay, and a rollback may name any.

    Example: loramux gc --store s3://models/loramux --delete
    """
    spared = _duration("--grace", grace)
    retention = Retention(keep, None if keep_for is None else _duration("--keep-for", keep_for))
    opened = open_store(load_settings(BuilderSettings, store=store).store)
    if delete:
        check_grace(opened, spared)
    with shell.working(f"looking through {opened.uri}"):
        found = find_orphans(opened, grace=spared, now=datetime.now(UTC), retention=retention)
    if found.old and not as_json:
        _show(found.old)
    with shell.working(f"removing from {opened.uri}"):
        gone = [orphan for orphan in found.old if delete and remove(opened, orphan)]
    if as_json:
        fields = {"orphans": _fields(found.old, gone), "spared": _fields(found.young, ()), "kept": found.kept}
        emit({"store": opened.uri} | fields)
        return
    _print_retained(found.kept)
    _sum(opened.uri, found.old, gone if delete else None)
    if found.young:
        shell.show(f"{_counted(found.young)} younger than {grace}: spared")


def _show(orphans: Sequence[Orphan]) -> None:
    now = datetime.now(UTC)
    rows = [
        [
            orphan.kind.value,
            shell.digest(orphan.name) if len(orphan.name) == 64 else orphan.name,
            decimal(orphan.size),
            f"{(now - orphan.modified) / timedelta(hours=1):.1f} h",
            orphan.why,
        ]
        for orphan in orphans
    ]
    shell.table(("kind", "name", "size", "age", "why"), rows, right=frozenset({"size", "age"}))


def _fields(orphans: Sequence[Orphan], gone: Sequence[Orphan]) -> list[dict[str, object]]:
    return [
        {
            "kind": orphan.kind,
            "name": orphan.name,
            "bytes": orphan.size,
            "modified": orphan.modified,
            "why": orphan.why,
            "removed": orphan in gone,
        }
        for orphan in orphans
    ]


def _sum(uri: str, old: Sequence[Orphan], gone: Sequence[Orphan] | None) -> None:
    if not old:
        shell.show(f"nothing to remove in {uri}")
    elif gone is None:
        shell.show(f"{_counted(old)} would be removed from {uri}: repeat with --delete")
    else:
        shell.show(f"{_counted(gone)} removed from {uri}")
        if len(gone) < len(old):
            shell.show(f"{len(old) - len(gone)} needed again meanwhile, spared")


def _print_retained(retained: Sequence[RetainedGeneration]) -> None:
    """Print why generations stay, a line for each deployment and reason."""
    for (name, why), found in groupby(retained, key=lambda each: (each.deployment, each.why)):
        some = list(found)
        numbers = listed([str(each.number) for each in some])
        most = max(each.bundles for each in some)
        bundles = counted(most, "bundle") if len(some) == 1 else f"up to {most} bundles each"
        stay = f"generation {numbers} stays" if len(some) == 1 else f"generations {numbers} stay"
        shell.show(f"{name}: {stay}: {why}; {bundles}")


def _counted(orphans: Sequence[Orphan]) -> str:
    size = decimal(sum(orphan.size for orphan in orphans))
    return f"{counted(len(orphans), 'orphan')}, {size},"


def _duration(flag: str, text: str) -> timedelta:
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]+)?)([dhms])", text)
    if match:
        return timedelta(**{_UNITS[match[2]]: float(match[1])})
    if text == "0":
        return timedelta()
    raise SettingsInvalid(f"{flag}={text}: expected a number with a unit (d, h, m or s), for example 24h")
