"""``loramux keys``: keys in a file, and their lines."""

import json
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loramux.cli.main import app
from loramux_shared.access import API_KEY
from loramux_shared.access.keyring import Keyring
from loramux_shared.access.keys import PREFIX, Scope, parse_keys
from tests.support.processes.commands import run


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, "")


def test_a_new_key_is_printed_once(tmp_path: Path) -> None:
    """``keys new --file`` prints the key alone; the file is its owner's alone, and the key opens by it."""
    path = tmp_path / "keys.jsonl"
    code, key, errors = run(
        "keys", "new", "--scope", "infer", "--model", "a", "--id", "ci", "--file", str(path)
    )
    assert (code, key.count("\n")) == (0, 1)
    assert key.strip() not in path.read_text() + errors
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    access = Keyring(path).authorize(key.strip(), Scope.INFER)
    assert (access.key_id, access.models) == ("ci", {"a"})


def test_without_a_file_the_line_is_printed_too(tmp_path: Path) -> None:
    """The key comes first, then the remark on it, and without --file the line that keeps it."""
    for more in ((), ("--file", str(tmp_path / "keys.jsonl"))):
        both = CliRunner().invoke(app, ["keys", "new", "--scope", "infer", *more]).output  # stdout and stderr
        assert both.index(PREFIX) < both.index("the key above is not shown again")
    code, text, _ = run("keys", "new", "--scope", "build", "--scope", "infer", "--comment", "Ann's")
    key, line = text.splitlines()
    [entry] = parse_keys(line, "stdout")
    assert code == 0
    assert Keyring(text=line).authorize(key, Scope.BUILD).scopes == {Scope.BUILD, Scope.INFER}
    assert (entry.comment, entry.created is not None) == ("Ann's", True)


def test_keys_are_listed_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removed key is out of the file; comments and the other keys stay as they were written."""
    path = tmp_path / "keys.jsonl"
    path.write_text("# who may enter")
    for key_id in ("ann", "bob"):
        assert run("keys", "new", "--scope", "infer", "--id", key_id, "--file", str(path))[0] == 0
    before = path.read_text().splitlines()
    monkeypatch.setenv("LORAMUX_KEYS_FILE", str(path))
    assert run("keys", "remove", "ann") == (0, f"ann is removed from {path}\n", "")
    assert path.read_text().splitlines() == [before[0], before[2]]
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(0o644)
    code, text, _ = run("keys", "list")
    assert code == 0
    assert [line.split()[:3] for line in text.splitlines()] == [
        ["id", "scopes", "models"],
        ["bob", "infer", "all"],
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_a_key_with_limits(tmp_path: Path) -> None:
    """The limits are in the key's line and in the list; a bad limit is one line and exit 2."""
    path = tmp_path / "keys.jsonl"
    limits = ("--weight", "0.5", "--max-running", "2", "--max-waiting", "3", "--tokens-per-minute", "4000")
    assert run("keys", "new", "--scope", "infer", *limits, "--file", str(path))[0] == 0
    [entry] = parse_keys(path.read_text(), "f")
    emitted = {"weight": 0.5, "max_running": 2, "max_waiting": 3, "tokens_per_minute": 4000}
    assert entry.limits.model_dump() == emitted
    _, text, _ = run("keys", "list", "--file", str(path), "--json")
    assert json.loads(text)["keys"][0]["limits"] == emitted
    _, text, _ = run("keys", "list", "--file", str(path))
    assert "weight 0.5" in " ".join(text.split())
    code, _, errors = run("keys", "new", "--scope", "infer", "--weight", "0")
    assert (code, errors.count("\n")) == (2, 1)
    assert "limits.weight: " in errors


def test_what_keys_refuses(tmp_path: Path) -> None:
    """A repeated id, an unknown id, a limit on admin and a missing folder are one line and exit 2."""
    path = str(tmp_path / "keys.jsonl")
    assert run("keys", "new", "--scope", "infer", "--id", "ci", "--file", path)[0] == 0
    for args, stated in (
        (("new", "--scope", "infer", "--id", "ci", "--file", path), "has a key 'ci' already"),
        (("remove", "nobody", "--file", path), "has no key 'nobody'. There: ci."),
        (("new", "--scope", "admin", "--model", "a"), "without admin"),
        (("new", "--scope", "infer", "--file", f"{tmp_path}/none/keys"), "cannot be written: No such file"),
        (("list", "--file", f"{tmp_path}/none"), "No such file or directory"),
    ):
        code, _, errors = run("keys", *args)
        assert code == 2
        assert stated in errors
        assert errors.count("\n") == 1
    assert run("keys", "new", "--scope", "root")[0] == 2
