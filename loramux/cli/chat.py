"""``loramux chat``: a conversation in the terminal with commands, or an answer per line of a pipe."""

import contextlib
import functools
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Annotated, Final

import typer

from loramux.cli import shell
from loramux.cli.exits import state_dir
from loramux.cli.serving import complete_model, no_such_model, unserved
from loramux.client import INFERENCE, Client
from loramux.records import Delta, Finished, GenerateOptions, Message
from loramux_shared.faults import Fault, RequestInvalid
from loramux_shared.runtime import MAX_TEMPERATURE

COMMANDS: Final = {
    "/model": "NAME  switch to another model; without NAME: print the current one",
    "/models": "list the models",
    "/system": "TEXT  set the system message; without TEXT: none",
    "/clear": "clear the conversation",
    "/help": "print this help",
    "/quit": "leave, as Ctrl-D does",
}


@dataclass
class ChatSession:
    """A chat: its messages and its model."""

    client: Client
    model: str
    options: GenerateOptions
    system: str = ""
    history: list[Message] = field(default_factory=list)
    """Messages without the system message."""

    def names(self) -> list[str]:
        """Return the models that are served."""
        return [each.name for each in self.client.models()]

    def use(self, model: str) -> None:
        """Switch to a model and keep the history; "" is the first one. Raises `ModelNotFound`."""
        served = self.names()
        if model and (unknown := unserved(model, served)):
            raise no_such_model(unknown[0], served)
        self.model = model or served[0]

    def answer(self, prompt: str) -> str:
        """Stream an answer to stdout and return its figures.

        One that is stopped or fails leaves what came of it in the history.
        """
        question: Message = {"role": "user", "content": prompt}
        answer: Message = {"role": "assistant", "content": ""}
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        begin = time.monotonic()
        tokens = 0
        events = self.client.generate(self.model, [*system, *self.history, question], **self.options)
        with contextlib.closing(events):
            try:
                for event in events:
                    if isinstance(event, Delta):
                        answer["content"] += event.text
                        write(event.text)
                    elif isinstance(event, Finished):
                        tokens = event.usage.completion_tokens
            finally:
                write("\n")
                if answer["content"]:
                    self.history += [question, answer]
        took = time.monotonic() - begin
        return f"{tokens} tokens, {took:.1f} s"

    def obey(self, line: str) -> bool:
        """Do what a line says, a command or something to answer; False to leave."""
        name, _, argument = line.partition(" ")
        if name == "/quit":
            return False
        if name in self._commands:
            self._commands[name](argument.strip())
        elif name.startswith("/"):
            shell.say(f"no command {name}; there are {', '.join(COMMANDS)}", "yellow")
        elif line:
            shell.say(self.answer(line), "dim")
        return True

    @property
    def _commands(self) -> Mapping[str, Callable[[str], None]]:
        return {
            "/model": self._model,
            "/models": self._models,
            "/system": self._set_system,
            "/clear": lambda _: self.history.clear(),
            "/help": lambda _: show_help(),
        }

    def _model(self, name: str) -> None:
        if name:
            self.use(name)
        else:
            shell.say(self.model)

    def _models(self, _: str) -> None:
        for name in self.names():
            shell.say(f"{'*' if name == self.model else ' '} {name}")

    def _set_system(self, text: str) -> None:
        self.system = text


def show_help() -> None:
    """Print the commands."""
    for name, text in COMMANDS.items():
        shell.say(f"{name:<8} {text}", "dim")
    shell.say("Ctrl-C stops an answer, TAB completes, the arrow keys recall earlier prompts", "dim")


def write(text: str) -> None:
    """Print a piece of an answer; on a terminal without what steers it."""
    sys.stdout.write(shell.printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


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
