"""The ``loramux`` command."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from io import TextIOWrapper
from typing import Annotated

import typer

from loramux.cli import deployments, keys, replica, shell
from loramux.cli.build import build, prove
from loramux.cli.change import add, push, remove
from loramux.cli.chat import chat
from loramux.cli.check import check
from loramux.cli.doctor.command import doctor
from loramux.cli.exits import tell_uncaught, tell_unraisable
from loramux.cli.gc import gc
from loramux.cli.import_bundle import import_bundle
from loramux.cli.kernels import kernels
from loramux.cli.local.demo import demo
from loramux.cli.local.run import run
from loramux.cli.local.services import builder, serve
from loramux.cli.local.up import up
from loramux.cli.rollout import rollout
from loramux.cli.serving import health, models
from loramux.connection import API_KEY
from loramux_shared.faults import SettingsInvalid
from loramux_shared.ports import registered

app = typer.Typer(
    name="loramux",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: half the lines, the same words
    context_settings={"help_option_names": ["--help", "-h"]},
)
for function in (demo, run, up, build, check, prove, add, remove, push, models, serve, builder, health):
    app.command()(function)
unusable: dict[str, SettingsInvalid] = {}
"""Why the commands of packages cannot be used that cannot be imported."""
others: dict[str, Callable[..., None] | typer.Typer] = {
    "cancel": deployments.cancel,
    "chat": chat,
    "deployments": deployments.deployments,
    "doctor": doctor,
    "gc": gc,
    "history": deployments.history,
    "import-bundle": import_bundle,
    "kernels": kernels,
    "keys": keys.app,
    "pin": replica.pin,
    "rollback": deployments.rollback,
    "rollout": rollout,
    "unpin": replica.unpin,
    "watch": deployments.watch,
    **{name: each.run for name, each in registered("command", shell.Command, unusable.__setitem__).items()},
}
for name, other in sorted(others.items()):
    if isinstance(other, typer.Typer):
        app.add_typer(other, name=name)
    else:
        app.command(name)(other)


def _refusing(fault: SettingsInvalid) -> Callable[[], None]:
    @shell.command
    def command() -> None:
        raise fault

    return command


for name, fault in unusable.items():
    anything = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    app.command(name, hidden=True, context_settings=anything)(_refusing(fault))


def _version(requested: bool) -> None:
    if requested:
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
