"""Promises that every command of ``loramux`` keeps: help, tables, completion and folders."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from loramux.cli.exits import MEANINGS
from loramux.cli.late import LateCommand
from loramux.cli.local.services import local_roots
from loramux.cli.local.up import UpPlan
from loramux.cli.main import app
from loramux.cli.tables import fitted, fitting_columns
from loramux_shared.deployment import Build, Deployment, Repository, SourceKind
from tests.support.cases import cases
from tests.support.root import PAGES, ROOT

WITHOUT_JSON = cases(__file__, "WITHOUT_JSON")


def commands(group: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, listed in group.commands.items():
        command = listed.loaded() if isinstance(listed, LateCommand) else listed
        if hasattr(command, "commands"):
            yield from commands(command, (*before, name))
        else:
            yield (*before, name), command


GROUP: Any = typer.main.get_command(app)
LISTED: dict[str, Any] = GROUP.commands
ALL = dict(commands(GROUP))
LISTING = """
import sys
from loramux.cli.main import main
try:
    main()
finally:
    print(sorted({"grpc", "google", "pydantic", "rich", "yaml", "numpy"} & set(sys.modules)))
"""


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


@pytest.mark.parametrize("name", LISTED)
def test_a_line_of_the_list_is_the_first_of_its_command(name: str) -> None:
    """The list, which imports no command, says of each what the command says first of itself, groups last."""
    command = LISTED[name].loaded()
    assert LISTED[name].get_short_help_str(400) == command.get_short_help_str(400)
    groups = [name for name, each in LISTED.items() if hasattr(each.loaded(), "commands")]
    assert list(LISTED)[-len(groups) :] == groups


def test_the_list_of_commands_imports_no_command() -> None:
    """The packages that commands need are imported when one of them is used."""
    done = subprocess.run([sys.executable, "-c", LISTING, "--help"], capture_output=True, text=True, check=True)
    assert "Commands:" in done.stdout
    assert done.stdout.endswith("\n[]\n")


def test_every_command_speaks_json_and_is_documented() -> None:
    """Every command has ``--json``, or is on a short list with a reason; docs/reference/cli.md names it."""
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    for words, command in ALL.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert ("--json" in options) != (" ".join(words) in WITHOUT_JSON), words
        assert f"`loramux {' '.join(words)}" in page, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_flag_that_a_page_shows_is_there(page: Path) -> None:
    """A command within a page has the flags that stand behind it there."""
    for line in page.read_text().replace("\\\n", " ").splitlines():
        for call in re.findall(r"loramux ((?:(?:keys|ray) )?[a-z-]+ [^`#|>]*)", line):
            words = tuple(call.split())
            if command := ALL.get(words[:1]) or ALL.get(words[:2]):
                flags = set(re.findall(r"(?<=\s)--[a-z][a-z-]+", f" {call}"))
                assert flags <= {"--help", *(flag for each in command.params for flag in each.opts)}, line


def test_exit_codes_are_documented() -> None:
    """The page of the command line has every exit status with its meaning."""
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    for code, meaning in MEANINGS.items():
        assert f"| {code.value} | {meaning} |" in page


HEADERS = ("model", "modules", "first, ms")
ROWS = (("SmolLM2-135M-Instruct", "-", "87/111/1110"), ("bård", "attn q k v dense, mlp gate", "5/5/5"))


def _lines(width: int) -> list[str]:
    screen = Console(width=width)
    with screen.capture() as stated:
        screen.print(fitted(HEADERS, ROWS, frozenset({"first, ms"}), width))
    return stated.get().splitlines()


@pytest.mark.parametrize("width", [64, 63, 43, 42, 30, 24])
def test_no_line_is_longer_and_no_word_is_broken(width: int) -> None:
    """All words of all cells are there at every width, each within one line."""
    lines = _lines(width)
    words = {word for line in lines for word in line.split()}
    assert max(map(len, lines)) <= max(width, len("modules    SmolLM2-135M-Instruct"))
    assert {word for row in ROWS for cell in row for word in cell.split() if cell != "-"} <= words


def test_columns_that_can_be_spared_go_first() -> None:
    """A table that is too wide loses its spare columns, the last one first, and reports them."""
    spare = ("first, ms", "modules")
    assert fitting_columns(HEADERS, ROWS, spare, 62) == ([0, 1, 2], [])
    assert fitting_columns(HEADERS, ROWS, spare, 61) == ([0, 1], ["first, ms"])
    assert fitting_columns(HEADERS, ROWS, spare, 30) == ([0], ["first, ms", "modules"])
    assert fitting_columns(HEADERS, ROWS, spare, 2) == ([0], ["first, ms", "modules"])


def completions(*words: str) -> tuple[list[str], str]:
    """Return what a shell offers for the last word of a line, and what is written on stderr."""
    requests = {
        "COMP_WORDS": " ".join(["loramux", *words]),
        "COMP_CWORD": str(len(words)),
        "_LORAMUX_COMPLETE": "complete_bash",
    }
    ended = CliRunner().invoke(app, [], prog_name="loramux", env=requests)
    return ended.stdout.split(), ended.stderr


def test_words_complete() -> None:
    """The shell completes commands and options."""
    assert (completions("dem"), completions("up", "--loc")) == ((["demo"], ""), (["--local-root"], ""))


def test_a_snapshot_of_the_hubs_cache_is_read_with_its_blobs(tmp_path: Path) -> None:
    """The files of a snapshot are links out of its folder; of others they alone are allowed."""
    model, plain = tmp_path / "models--org--base", tmp_path / "snapshots" / "plain"
    for folder in (snapshot := model / "snapshots" / "abc", model / "blobs", plain):
        folder.mkdir(parents=True)
    local = [Repository(source=SourceKind.LOCAL, repo=str(folder)) for folder in (snapshot, plain, snapshot)]
    hub = Repository(source=SourceKind.HF, repo="org/other")
    assert local_roots([*local, hub]) == [snapshot, plain, model / "blobs"]


def test_up_reads_beside_its_file_and_below_its_roots(tmp_path: Path) -> None:
    """Only files that the deployment names are read outside its file's folder and those of --local-root."""
    base, one = (Repository(source=SourceKind.LOCAL, repo=str(tmp_path / each)) for each in ("base", "a/one"))
    deployment = Deployment(model_name="m", build=Build(checkpoint_repository=base, lora_adapters={"1": one}))
    roots = [tmp_path / "a", tmp_path / "b", tmp_path / "a"]
    plan = UpPlan(deployment, "file:///none", "127.0.0.1:1", "127.0.0.1:2", roots=roots)
    assert plan.local_roots == [tmp_path / "base", tmp_path / "a", tmp_path / "b"]
