"""The ``loramux`` command."""

import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated

import typer

from loramux.cli.commands import FIRST, OTHERS
from loramux.cli.exits import tell_uncaught, tell_unraisable
from loramux.cli.late import Command, LateCommand, Load, Run
from loramux_shared.access import API_KEY
from loramux_shared.ports import importing, registered

if TYPE_CHECKING:
    from loramux_shared.faults import SettingsInvalid

app = typer.Typer(
    name="loramux",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: half the lines, the same words
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _of_package(name: str, load: Load) -> Load:
    @functools.wraps(load)
    def loading() -> Run:
        with importing(name, load.__module__.partition(".")[0]):
            return load()

    return loading


def _raising(fault: "SettingsInvalid") -> Load:
    def loading() -> Run:
        raise fault

    return loading


def _add_commands() -> None:
    """Add those of the core, and of packages, whose entries are hidden where they cannot be imported."""
    unusable: dict[str, SettingsInvalid] = {}
    added = registered("command", Command, unusable.__setitem__).items()
    others = OTHERS | {name: replace(each, load=_of_package(name, each.load)) for name, each in added}
    for load in FIRST:
        app.command(cls=LateCommand)(load)
    for name, other in sorted(others.items(), key=lambda item: (item[1].is_group, item[0])):
        app.command(name, cls=LateCommand)(other.load)
    for name, fault in unusable.items():
        app.command(name, cls=LateCommand, hidden=True)(_raising(fault))


_add_commands()


def _version(requested: bool) -> None:
    if requested:
        from loramux.cli import shell

        shell.show(f"loramux {version('loramux')}")
        raise typer.Exit


def _show_key(key: str) -> None:
    if key:
        os.environ[API_KEY] = key  # clients look there


@app.callback()
def loramux(
    show_version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    api_key: Annotated[
        str, typer.Option("--api-key", callback=_show_key, metavar="KEY", help=f"API key; default: {API_KEY}.")
    ] = "",
) -> None:
    """One base model, hundreds of LoRA adapters, one server.

    Example: loramux demo
    """


def usual(words: Sequence[str]) -> list[str]:
    """Return a command line as the parser wants it, where people write it otherwise.

    ``help COMMAND`` is ``COMMAND --help``, and ``--api-key`` may stand behind the command too.
    """
    if words[:1] == ["help"]:
        return [*words[1:], "--help"]
    first: list[str] = []
    rest = list(words)
    end = rest.index("--") if "--" in rest else len(rest)
    for index, word in enumerate(rest[:end]):
        if word == "--api-key" or word.startswith("--api-key="):
            taken = rest[index : index + (1 if "=" in word else 2)]
            first, rest = taken, rest[:index] + rest[index + len(taken) :]
            break
    return [*first, *rest]


def main() -> None:
    """Run the command line; `loramux.cli.exits` has the exit codes."""
    sys.excepthook = tell_uncaught
    sys.unraisablehook = tell_unraisable
    if isinstance(sys.stdout, TextIOWrapper):  # answers have characters that not every terminal has
        sys.stdout.reconfigure(errors="backslashreplace")
    typer.main.get_command(app)(usual(sys.argv[1:]), prog_name="loramux")


if __name__ == "__main__":
    main()
