"""``loramux chat``: a conversation in the terminal, or one answer per line of a pipe."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Annotated

import typer

from loramux.cli import shell
from loramux.cli.conversation import COMMANDS, ChatSession
from loramux.cli.exits import state_dir
from loramux.cli.serving import complete_model
from loramux.client import INFERENCE, Client
from loramux.records import GenerateOptions
from loramux_shared.faults import Fault, RequestInvalid
from loramux_shared.runtime import MAX_TEMPERATURE

try:
    import readline
except ImportError:  # Windows, and builds of Python without it
    _readline: ModuleType | None = None
else:
    _readline = readline

HISTORY_LINES = 1000


@shell.command
def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="[MODEL]",
            help="Base, adapter, or blend as a*0.7+b*0.5; default: the first model.",
            show_default=False,
            autocompletion=complete_model,
        ),
    ] = "",
    grpc: shell.Grpc = INFERENCE,
    system: Annotated[str, typer.Option("--system", metavar="TEXT", help="System message.")] = "",
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", metavar="N", min=1, help="Most tokens of an answer.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            metavar="T",
            min=0,
            max=MAX_TEMPERATURE,
            help="Temperature; 0, the default, is greedy.",
        ),
    ] = None,
) -> None:
    """Chat with a model; piped input: one answer per line.

    /help lists what can be typed beside words, /model NAME for one. Ctrl-C stops an
    answer, Ctrl-D leaves.

    Example: loramux chat my-adapter --temperature 0.7
    """
    options: GenerateOptions = {"max_tokens": max_tokens, "temperature": temperature}
    with Client(inference=grpc) as client:
        talk = ChatSession(client, model, options, system)
        talk.use(model)
        if sys.stdin is None:
            raise RequestInvalid("stdin is closed. Pipe prompts into it, or run it in a terminal")
        if sys.stdin.isatty():
            _converse(talk)
        else:
            _answer_lines(talk)


def _answer_lines(talk: ChatSession) -> None:
    """Answer every line by itself: they are data, so there are no commands among them."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    for line in sys.stdin:
        if prompt := line.strip():
            talk.history.clear()
            talk.answer(prompt)


def _converse(talk: ChatSession) -> None:
    shell.say(f"{', '.join(COMMANDS)}; Ctrl-C stops an answer, Ctrl-D leaves", "dim")
    with line_editor(functools.partial(_completions, talk)):
        while True:
            try:
                if not talk.obey(input(f"{shell.printable(talk.model)}> ").strip()):
                    return
            except EOFError:
                shell.say()
                return
            except Fault as fault:
                shell.complain(fault)
            except KeyboardInterrupt:
                shell.say("\nstopped; /quit or Ctrl-D leaves", "dim")


def _completions(talk: ChatSession, line: str) -> list[str]:
    name, blank, begun = line.partition(" ")
    if not blank:
        return [command for command in COMMANDS if command.startswith(name)]
    if name != "/model":
        return []
    try:
        return [f"{name} {model}" for model in talk.names() if model.startswith(begun)]
    except Fault:
        return []


@contextlib.contextmanager
def line_editor(candidates: Callable[[str], Sequence[str]]) -> Iterator[None]:
    """Give ``input()`` its keys and its history meanwhile; candidates returns what a line may become."""
    if _readline is None:
        yield
        return
    file = state_dir() / "chat_history"
    with contextlib.suppress(OSError):
        _readline.read_history_file(file)
    _readline.set_history_length(HISTORY_LINES)
    _readline.set_completer_delims("")
    _readline.set_completer(_completer(candidates))
    libedit = "libedit" in (_readline.__doc__ or "")
    _readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.touch(mode=0o600)  # conversations are private
            _readline.write_history_file(file)


def _completer(candidates: Callable[[str], Sequence[str]]) -> Callable[[str, int], str | None]:
    found: list[str] = []

    def complete(line: str, state: int) -> str | None:
        if state == 0:
            found[:] = candidates(line)
        return found[state] if state < len(found) else None

    return complete
