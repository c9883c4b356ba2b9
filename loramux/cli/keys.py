"""``loramux keys``: API keys in a file; what people wrote into it, comments included, stays as it is."""

import os
import secrets
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from loramux.cli import shell
from loramux.cli.documents import emit
from loramux_shared.access.keyring import read_keys_file
from loramux_shared.access.keys import KeyEntry, Scope, digest, explain, new_key, parse_keys
from loramux_shared.faults import SettingsInvalid
from loramux_shared.runtime import Limits

MODE = 0o600
"""File mode of a new key file. The file opens nothing, but its names show who has a key."""


def append_entry(path: Path, entry: KeyEntry) -> None:
    """Add a key to a file, which is made where there is none.

    Raises:
        SettingsInvalid: the file is broken, cannot be written, or has a key of that id.
    """
    before = read_keys_file(path) if path.exists() else ""
    if any(each.id == entry.id for each in parse_keys(before, str(path))):
        raise SettingsInvalid(
            f"{path} has a key {entry.id!r} already. Choose another --id, or remove that one."
        )
    begin = "\n" if before and not before.endswith("\n") else ""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, MODE), "w") as file:
            file.write(f"{begin}{entry.line()}\n")
    except OSError as error:
        raise _cannot(path, error) from error


def remove_entry(path: Path, key_id: str) -> None:
    """Remove a key from a file, in one step for those who read it.

    Raises:
        SettingsInvalid: the file is broken, cannot be written, or has no such key.
    """
    text = read_keys_file(path)
    entries = parse_keys(text, str(path))
    gone = next((entry for entry in entries if entry.id == key_id), None)
    if gone is None:
        known = ", ".join(entry.id for entry in entries) or "none"
        raise SettingsInvalid(f"{path} has no key {key_id!r}. There: {known}.")
    remaining = [line for line in text.splitlines(keepends=True) if gone.sha256 not in line]
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            file.write("".join(remaining))
        shutil.copymode(path, file.name)
        Path(file.name).replace(path)
    except OSError as error:
        raise _cannot(path, error) from error


def _cannot(path: Path, error: OSError) -> SettingsInvalid:
    return SettingsInvalid(f"keys file {path} cannot be written: {error.strerror}.")


app = typer.Typer(
    help="Make, list and remove API keys.\n\nExample: loramux keys new --scope infer --file keys.jsonl",
    no_args_is_help=True,
)

VARIABLE = "LORAMUX_KEYS_FILE"
File = Annotated[
    Path,
    typer.Option(
        "--file", envvar=VARIABLE, show_envvar=False, metavar="FILE", help=f"Keys file; default: {VARIABLE}."
    ),
]


@app.command()
@shell.command
def new(
    scope: Annotated[
        list[Scope],
        typer.Option("--scope", metavar="SCOPE", help=f"Scope: {', '.join(Scope)}; repeatable."),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME", help="Model that the key may use; repeatable."),
    ] = None,
    weight: Annotated[
        float | None, typer.Option("--weight", metavar="W", help="Weight beside other keys; default 1.")
    ] = None,
    max_running: Annotated[
        int | None, typer.Option("--max-running", metavar="N", help="Most running answers of each model.")
    ] = None,
    max_waiting: Annotated[
        int | None, typer.Option("--max-waiting", metavar="N", help="Most waiting requests.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None,
        typer.Option("--tokens-per-minute", metavar="N", help="Tokens a minute of prompts and answers."),
    ] = None,
    key_id: Annotated[str, typer.Option("--id", metavar="ID", help="Id in lists; default: drawn.")] = "",
    comment: Annotated[str, typer.Option("--comment", metavar="TEXT", help="Owner.")] = "",
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="Keys file to append to; default: print.")
    ] = None,
    as_json: shell.Json = False,
) -> None:
    """Print a new key, once; what is kept of it is a digest.

    Services that run take it as soon as it is in their file.

    Example: loramux keys new --scope infer --model my-adapter --file keys.jsonl
    """
    key = new_key()
    limits_of_key = {
        "weight": weight,
        "max_running": max_running,
        "max_waiting": max_waiting,
        "tokens_per_minute": tokens_per_minute,
    }
    limits = {name: value for name, value in limits_of_key.items() if value is not None}
    about = {"id": key_id or f"k{secrets.token_hex(4)}", "scopes": scope, "models": model, "comment": comment}
    entry = _entry(key, about | ({"limits": limits} if limits else {}))
    if file is not None:
        append_entry(file.expanduser(), entry)
    if as_json:
        emit({"key": key, "entry": entry})
    else:
        shell.show(key)
    if file is not None:
        shell.say(f"{entry.id} is in {file}; the key above is not shown again", "dim")
    elif not as_json:
        shell.say("the key above is not shown again; the line for the keys file or LORAMUX_API_KEYS:", "dim")
        shell.show(entry.line())


@app.command("list")
@shell.command
def list_keys(file: File, as_json: shell.Json = False) -> None:
    """List the keys of a file.

    Example: loramux keys list --file keys.jsonl
    """
    entries = parse_keys(read_keys_file(file), str(file))
    if as_json:
        emit({"keys": entries})
        return
    rows = [
        (
            entry.id,
            ", ".join(entry.scopes),
            ", ".join(entry.models or ("all",)),
            _limits_text(entry.limits),
            f"{entry.created:%Y-%m-%d}" if entry.created else "-",
            entry.comment or "-",
        )
        for entry in entries
    ]
    shell.table(("id", "scopes", "models", "limits", "created", "comment"), rows)


@app.command()
@shell.command
def remove(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the key, as listed.", show_default=False)],
    file: File,
    as_json: shell.Json = False,
) -> None:
    """Remove a key; services that run refuse it at once.

    Example: loramux keys remove ci --file keys.jsonl
    """
    remove_entry(file, key_id)
    if as_json:
        emit({"removed": key_id})
    else:
        shell.show(f"{key_id} is removed from {file}")


def _limits_text(limits: Limits | None) -> str:
    items = limits.model_dump().items() if limits else ()
    return ", ".join(f"{name} {value}" for name, value in items) or "-"


def _entry(key: str, about: dict[str, Any]) -> KeyEntry:
    created = datetime.now(UTC).replace(microsecond=0)
    try:
        return KeyEntry.model_validate(about | {"sha256": digest(key).hex(), "created": created})
    except ValidationError as error:
        raise SettingsInvalid("; ".join(explain(error))) from error
