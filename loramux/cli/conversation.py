"""A conversation with a model: who speaks, what was said, and the commands in between."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from loramux.cli import shell
from loramux.cli.serving import no_such_model, unserved
from loramux.client import Client
from loramux.records import Delta, Finished, GenerateOptions, Message

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
