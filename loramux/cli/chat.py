"""``loramux chat``: a conversation in the terminal, or one answer per line of a pipe."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from dataclasses import dataclass, field
from typing import Annotated

import typer

from loramux.cli import shell
from loramux.client import INFERENCE, Client
from loramux.records import Delta, GenerateOptions, Message
from shared.faults import Fault, ModelNotFound

COMMANDS = "/model NAME, /reset, /quit; Ctrl-C stops an answer, Ctrl-D leaves"


@dataclass
class Chat:
    """A conversation with a model."""

    client: Client
    model: str
    options: GenerateOptions
    system: str = ""
    history: list[Message] = field(default_factory=list)

    def reset(self) -> None:
        """Forget what was said."""
        self.history = [{"role": "system", "content": self.system}] if self.system else []

    def use(self, model: str) -> None:
        """Go on with another model, history included; raises `ModelNotFound`."""
        served = [each.name for each in self.client.models()]
        if model not in served:
            raise ModelNotFound(f"no model {model!r}; served are {', '.join(served)}")
        self.model = model

    def answer(self, said: str) -> None:
        """Stream an answer to stdout; one that is stopped or fails leaves what came of it in the history."""
        question: Message = {"role": "user", "content": said}
        answer: Message = {"role": "assistant", "content": ""}
        events = self.client.generate(self.model, [*self.history, question], **self.options)
        with contextlib.closing(events):
            try:
                for event in events:
                    if isinstance(event, Delta):
                        answer["content"] += event.text
                        _write(event.text)
            finally:
                _write("\n")
                if answer["content"]:
                    self.history += [question, answer]


@shell.command
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The base or an adapter.", show_default=False)],
    grpc: shell.Grpc = INFERENCE,
    system: Annotated[str, typer.Option("--system", metavar="TEXT", help="A system message.")] = "",
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", metavar="N", min=1, help="Length of an answer.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", metavar="T", min=0, help="0, the default, is greedy.")
    ] = None,
) -> None:
    """Chat with a model; piped input: one answer per line.

    Inside: /model NAME, /reset, /quit. Ctrl-C stops an answer, Ctrl-D leaves.

    Example: loramux chat my-adapter --temperature 0.7
    """
    options: GenerateOptions = {"max_tokens": max_tokens, "temperature": temperature}
    with Client(inference=grpc) as client:
        talk = Chat(client, model, options, system)
        talk.use(model)
        talk.reset()
        if sys.stdin.isatty():
            _converse(talk)
        else:
            _answer_lines(talk)


def _answer_lines(talk: Chat) -> None:
    for line in sys.stdin:
        if said := line.strip():
            talk.reset()
            talk.answer(said)


def _converse(talk: Chat) -> None:
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives input() its history and its keys
    shell.say(COMMANDS, "dim")
    while True:
        try:
            said = input(f"{talk.model}> ").strip()
        except EOFError:
            shell.say()
            return
        except KeyboardInterrupt:
            shell.say("\n/quit or Ctrl-D leaves", "dim")
            continue
        try:
            if not _turn(talk, said):
                return
        except Fault as fault:
            shell.complain(fault)
        except KeyboardInterrupt:
            shell.say("stopped", "dim")


def _turn(talk: Chat, said: str) -> bool:
    """Do what was typed; False to leave."""
    name, _, argument = said.partition(" ")
    if name == "/quit":
        return False
    if name == "/reset":
        talk.reset()
    elif name == "/model":
        talk.use(argument.strip())
    elif name.startswith("/"):
        shell.say(COMMANDS, "dim")
    elif said:
        begin = time.monotonic()
        talk.answer(said)
        shell.say(f"{time.monotonic() - begin:.1f} s", "dim")
    return True


def _write(text: str) -> None:
    sys.stdout.write(shell.printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
