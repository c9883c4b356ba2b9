"""The ``loramux`` command."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from loramux.cli import shell
from loramux.cli.build import build, prove
from loramux.cli.cancel import cancel
from loramux.cli.chat import chat
from loramux.cli.check import check
from loramux.cli.demo import demo
from loramux.cli.gc import gc
from loramux.cli.import_bundle import import_bundle
from loramux.cli.look import health, models
from loramux.cli.services import builder, serve
from loramux.cli.up import up

app = typer.Typer(
    name="loramux",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: half the lines, the same words
    context_settings={"help_option_names": ["--help", "-h"]},
)
for function in (
    *(demo, up, build, cancel, check, prove, import_bundle, gc),
    *(models, chat, serve, builder, health),
):
    app.command()(function)


def _version(wanted: bool) -> None:
    if wanted:
        shell.show(f"loramux {version('loramux')}")
        raise typer.Exit


@app.callback()
def loramux(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """One base model, hundreds of LoRA adapters, one server.

    Example: loramux demo
    """


def main() -> None:
    """Run the command line: exit 1 on a failure, 2 on bad usage or settings, 130 on Ctrl-C."""
    app()
