"""The parts that all commands share: the two consoles, common flags, tables, and the output of failures."""

import functools
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, ParamSpec, Protocol, Self, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from loramux.cli.documents import emit_line
from loramux.cli.exits import Exit, exit_of
from loramux.cli.tables import fitted, fitting_columns
from loramux_shared.faults import Fault, SettingsInvalid
from loramux_shared.pages import page
from loramux_shared.signatures import read_signer

P = ParamSpec("P")
R = TypeVar("R")


class Screen(Console):
    """A console that ends the command when its reader is gone."""

    def on_broken_pipe(self) -> None:
        """Tell the command."""
        raise BrokenPipeError


# Results go to out, progress and messages to err.
out = Screen(highlight=False, emoji=False)
err = Screen(stderr=True, highlight=False, emoji=False)

MAX_FINDINGS = 20
"""Most findings of one failure that are printed; --json has all that were sent."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

Grpc = Annotated[str, typer.Option("--grpc", metavar="HOST:PORT", help="Inference service.")]
Builder = Annotated[str, typer.Option("--builder", metavar="HOST:PORT", help="Builder service.")]
Store = Annotated[str, typer.Option("--store", metavar="URI", help="Store: s3://bucket/prefix or file:///dir.")]
LocalRoots = Annotated[
    list[Path] | None,
    typer.Option("--local-root", metavar="DIR", help="Root of LOCAL repositories; repeatable."),
]
Backend = Annotated[
    str | None, typer.Option("--backend", metavar="NAME", help="Backend: auto, native, torch or triton.")
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", metavar="NAME", help="Type: auto, float32, bfloat16 or float16.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, metavar="N", help="CPU threads.")]
ApiProcesses = Annotated[
    int | None, typer.Option("--api-processes", min=0, metavar="N", help="API processes; 0: none.")
]
TruncateTo = Annotated[
    int | None,
    typer.Option("--truncate-to", metavar="R", min=1, help="Rank to which higher ones are truncated."),
]
SignedBy = Annotated[
    list[str] | None,
    typer.Option(
        "--signed-by",
        metavar="SIGNER",
        help=f"Required signer; repeatable: {page('extensions/signing/README.md')}",
    ),
]
File = Annotated[Path, typer.Argument(metavar="FILE", help="Deployment file (YAML).", show_default=False)]
_PAGE: Final = page("docs/reference/cli.md")
Json = Annotated[bool, typer.Option("--json", help=f"Print JSON; see {_PAGE}.")]
JsonLines = Annotated[bool, typer.Option("--json", help=f"Print JSON lines; see {_PAGE}.")]


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Turn a command's failures into lines on stderr and an exit code; never a traceback.

    A command that was asked for JSON ends with a document that holds the failure.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Fault as fault:
            complain(fault)
            if kwargs.get("as_json"):
                emit_line({"error": fault})
            raise typer.Exit(exit_of(fault)) from None
        except KeyboardInterrupt:
            raise typer.Exit(Exit.INTERRUPTED) from None
        except BrokenPipeError:
            # Python would write the buffered rest at its end, and fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # type: ignore[union-attr]
            raise typer.Exit(Exit.PIPE_CLOSED) from None

    return wrapper


def signers(words: Sequence[str] | None) -> tuple[str, ...]:
    """Return the signers that words name, and read files here; raise SettingsInvalid where one is no signer."""
    try:
        return tuple(read_signer(word, Path()) for word in words or ())
    except ValueError as error:
        raise SettingsInvalid(f"--signed-by: expected {error}") from error


def complain(fault: Fault) -> None:
    """Print a failure with its first findings."""
    message, *findings = str(fault).split("\n")
    more = [f"  and more: these are the first {MAX_FINDINGS}"] if len(findings) > MAX_FINDINGS else []
    text = "\n".join([message, *findings[:MAX_FINDINGS], *more])
    line = Text.assemble(("error: ", "bold red"), (fault.reason, "bold"), f": {printable(text)}")
    err.print(line, soft_wrap=not err.is_terminal)


def say(text: str = "", style: str = "") -> None:
    """Print a line on stderr; a terminal breaks it between words."""
    err.print(Text(printable(text), style), soft_wrap=not err.is_terminal)


def show(text: str = "", style: str = "") -> None:
    """Print a line on stdout, in one piece: it may be copied."""
    out.print(Text(printable(text), style), soft_wrap=True)


def printable(text: str) -> str:
    """Return text without characters that steer a terminal; what models and servers say is not trusted."""
    return _CONTROL.sub("", text)


AFTER_S: Final = 0.3
"""Seconds before it is shown; something shorter would flash, and nobody could read it."""


class Drawing(Protocol):
    """A spinner or bars of rich."""

    def start(self) -> None:
        """Begin to draw."""
        ...

    def stop(self) -> None:
        """End it."""
        ...


class Later:
    """Shows something once the block has taken a while; a block that is over before is never seen."""

    def __init__(self, drawing: Drawing, after_s: float = AFTER_S) -> None:
        self._drawing = drawing
        self._lock = threading.Lock()
        self._timer = threading.Timer(after_s, self._start)
        self._timer.daemon = True
        self._ended = self._started = False

    def _start(self) -> None:
        with self._lock:
            if not self._ended:
                self._started = True
                self._drawing.start()

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            self._ended = True
            if self._started:
                self._drawing.stop()


@dataclass
class Came:
    """The result of a step."""

    of_it: str = ""
    """The end of a finished step's line; empty: none."""
    tell: Callable[[str], None] = lambda doing: say(f"  {doing}", "dim")
    """Shows what the step does now: beside its spinner on a terminal, as a line elsewhere."""


@contextmanager
def step(doing: str) -> Iterator[Came]:
    """Show a spinner while something runs, and a line with its time and what came of it when it is done."""
    begin, came = time.monotonic(), Came()
    if not err.is_terminal:
        say(f"{doing} ...")
        yield came
        if came.of_it:
            say(f"{doing}: {came.of_it}")
        return
    status = err.status(Text(f"{doing} …"))
    came.tell = lambda now: status.update(Text(f"{doing}: {printable(now)} …"))
    with Later(status):
        yield came
    took = f"  {time.monotonic() - begin:.1f} s"
    line = f"{doing}: {came.of_it}" if came.of_it else doing
    err.print(Text.assemble(("✓ ", "green"), line, (took, "dim")), soft_wrap=True)


@contextmanager
def working(doing: str) -> Iterator[None]:
    """Show a spinner on a terminal while something takes long, and nothing afterwards or elsewhere."""
    if not err.is_terminal:
        yield
        return
    with Later(err.status(Text(f"{doing} …"))):
        yield


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: frozenset[str] = frozenset(),
    *,
    spare: Sequence[str] = (),
    wide: bool = False,
) -> None:
    """Print a table on stdout: no wider than a terminal that it goes to, else aligned and one line a row.

    On a terminal that is too narrow, columns of spare are left out, the first ones first. With wide, a row is
    a line with all its columns there too.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    if wide or not out.is_terminal:
        widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
        for row in (headers, *rows):
            cells = [
                cell.rjust(width) if header in right else cell.ljust(width)
                for header, cell, width in zip(headers, row, widths, strict=True)
            ]
            show("  ".join(cells).rstrip())
        return
    places, left_out = fitting_columns(headers, rows, spare, out.width)
    chosen = [[row[i] for i in places] for row in (headers, *rows)]
    out.print(fitted(chosen[0], chosen[1:], right, out.width))
    if left_out:
        say(f"left out, as the terminal is too narrow: {', '.join(left_out)} (--wide shows all)", "dim")


def numbers(values: Sequence[int]) -> str:
    """Return ranks for a cell."""
    return ", ".join(map(str, values)) or "-"


def modules(names: Sequence[str]) -> str:
    """Return module names for a cell, each block's name once: ``attn q k v, mlp gate``."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        block, _, leaf = name.partition("_")
        blocks.setdefault(block, []).append(leaf)
    return ", ".join(" ".join([block, *leaves]).strip() for block, leaves in blocks.items()) or "-"


def digest(hexadecimal: str) -> str:
    """Return the first digits of a digest."""
    return hexadecimal[:12] or "-"
