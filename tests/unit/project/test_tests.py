"""Tests as colleagues read them: a sentence for each, and lines that fit into a screen."""

import ast
from pathlib import Path

import pytest

from tests.support.root import ROOT

MAX_LINE_CHARACTERS = 400
RECORDED = {"openapi.txt", "responses.txt"}
"""Files that a program writes, as `make golden` does, with texts of the APIs in them."""
FOLDERS = [folder for folder in (ROOT / "tests", *ROOT.glob("extensions/*/tests")) if folder.is_dir()]


@pytest.fixture(params=FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def files(request: pytest.FixtureRequest) -> list[Path]:
    """Return the files of a folder of tests."""
    return [path for path in request.param.rglob("*.*") if path.is_file() and "__pycache__" not in path.parts]


def test_every_test_says_what_it_states(files: list[Path]) -> None:
    """A test has a docstring, which is a sentence."""
    silent = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in files
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
        if not (ast.get_docstring(node) or "").endswith(".")
    ]
    assert silent == []


def test_a_line_can_be_read(files: list[Path]) -> None:
    """A line of a module or a table that a person edits has at most 400 characters."""
    texts = [path for path in files if path.suffix in (".py", ".json", ".txt") and path.name not in RECORDED]
    assert [
        path for path in texts if max(map(len, path.read_text().splitlines()), default=0) > MAX_LINE_CHARACTERS
    ] == []
