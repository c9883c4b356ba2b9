"""Promises that every command of ``loramux`` keeps; the commands are found by looking at the application."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from loramux.cli.exits import MEANINGS
from loramux.cli.main import app
from tests.support.root import ROOT

WITHOUT_JSON = {
    "chat": "a conversation: what it prints is the answer itself",
    "demo": "a show for people; up and bench are for machines",
    "serve": "becomes the service, whose log is JSON on stderr",
    "builder": "becomes the service, whose log is JSON on stderr",
    "envoy": "prints YAML, for Envoy",
}


def commands(group: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Give every command with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*before, name))
        else:
            yield (*before, name), command


ALL = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_fits_a_screen(words: tuple[str, ...]) -> None:
    """The help of every command fits 24 lines of 80 columns and has an example."""
    result = CliRunner().invoke(app, [*words, "--help"])
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert f"Example: loramux {' '.join(words)}" in result.stdout
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80


def test_the_list_of_commands_says_what_each_does() -> None:
    """The first page names every command with a whole sentence."""
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    listed = result.stdout.partition("Commands:")[2].splitlines()[1:]
    assert [line.split()[0] for line in listed] == list(dict.fromkeys(words[0] for words in ALL))
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)


def test_every_command_speaks_json_and_is_documented() -> None:
    """Every command has ``--json``, or is on a short list with a reason; docs/reference/cli.md names it."""
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    for words, command in ALL.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert ("--json" in options) != (" ".join(words) in WITHOUT_JSON), words
        assert f"`loramux {' '.join(words)}" in page, words


def test_exit_codes_are_documented() -> None:
    """The table of docs/reference/cli.md is the one that the program has."""
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    for code, meaning in MEANINGS.items():
        assert f"| {code.value} | {meaning} |" in page
