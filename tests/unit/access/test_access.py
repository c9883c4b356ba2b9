"""Keys: what the key file stores, the rights of each key, and reloads of a changed file."""

import json
import os
from pathlib import Path

import pytest
import structlog

from loramux_shared.access.guard import is_local, open_guard
from loramux_shared.access.keyring import Keyring, bearer, key_of
from loramux_shared.access.keys import digest, parse_keys
from loramux_shared.faults import SettingsInvalid, Unauthenticated
from loramux_shared.settings import BuilderSettings
from tests.support.access import lines, new_entry
from tests.support.cases import cases


def test_an_entry_survives_its_line() -> None:
    """A line of the file says everything about a key but the key."""
    key, entry = new_entry("ci", "infer", models=("a", "b"))
    text = f"# ours\n\n{lines(entry)}"
    assert parse_keys(text, "f") == [entry]
    assert key not in text
    assert json.loads(entry.line())["sha256"] == digest(key).hex()


@pytest.mark.parametrize(("line", "expected"), cases(__file__, "test_a_bad_line"))
def test_a_bad_line(line: str, expected: str) -> None:
    """A bad line is named by its number and field, and nothing of it is repeated: it may hold a key."""
    good = lines(new_entry("first", "infer")[1])
    with pytest.raises(SettingsInvalid) as caught:
        parse_keys(good + line.replace("%s", "0" * 64), "keys.jsonl")
    assert str(caught.value).startswith("keys.jsonl: ")
    assert expected in str(caught.value)
    assert "pasted" not in str(caught.value)


def test_one_key_twice() -> None:
    """A key under two ids is a mistake: removing one of them would change nothing."""
    _, entry = new_entry("a", "infer")
    with pytest.raises(SettingsInvalid, match="same sha256"):
        parse_keys(lines(entry, entry.model_copy(update={"id": "b"})), "f")


@pytest.mark.parametrize("wrong", [None, "", "lmx_", "x" * 100_000, "ключ", "\udcff"])
def test_what_is_no_key_of_ours(wrong: str | None) -> None:
    """Nothing, and anything that is no key, is refused, and the refusal does not repeat the text."""
    key, entry = new_entry("ci", "infer")
    ring = Keyring(text=lines(entry))
    with pytest.raises(Unauthenticated) as caught:
        ring.authorize(wrong, None)
    assert key not in str(caught.value)
    assert not wrong or wrong not in str(caught.value)
    with pytest.raises(Unauthenticated):  # a reader of the file cannot enter with its content
        ring.authorize(entry.sha256, None)


@pytest.mark.parametrize("damage", ["broken", "gone"])
def test_a_broken_file_changes_nothing(damage: str, tmp_path: Path) -> None:
    """A file that cannot be taken leaves the keys as they were, and is named in the log, once."""
    key, entry = new_entry("ci", "infer")
    path = tmp_path / "keys.jsonl"
    path.write_text(lines(entry))
    ring = Keyring(path)
    path.unlink() if damage == "gone" else path.write_text(f"{lines(entry)}lmx_pasted-key")
    with structlog.testing.capture_logs() as logs:
        assert [ring.authorize(key, None).key_id for _ in range(3)] == ["ci"] * 3
    assert [(each["log_level"], each["file"]) for each in logs] == [("warning", str(path))]
    assert "pasted" not in str(logs)


def test_a_file_replaced_by_one_of_the_same_size_and_time(tmp_path: Path) -> None:
    """A file that another takes the place of is read, though neither size nor time tells them apart."""
    (old, first), (new, second) = new_entry("k", "infer"), new_entry("k", "infer")
    path, other = tmp_path / "keys.jsonl", tmp_path / "other"
    path.write_text(lines(first))
    ring = Keyring(path)
    other.write_text(lines(second))
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)
    assert ring.authorize(new, None).key_id == "k"
    with pytest.raises(Unauthenticated):
        ring.authorize(old, None)


def test_a_broken_file_stops_the_start(tmp_path: Path) -> None:
    """A service does not start with a keys file that it cannot read."""
    with pytest.raises(SettingsInvalid, match=r"No such file .*loramux keys new"):
        Keyring(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsInvalid, match="it is not text"):
        Keyring(tmp_path / "binary")


def test_file_and_variable_add_up(tmp_path: Path) -> None:
    """Keys of the file and of the variable are one keyring, which does not show them."""
    (one, first), (two, second) = new_entry("one", "infer"), new_entry("two", "build")
    (tmp_path / "k").write_text(lines(first))
    ring = Keyring(tmp_path / "k", lines(second))
    assert (ring.authorize(one, None).key_id, ring.authorize(two, None).key_id) == ("one", "two")
    assert repr(ring) == f"Keyring(2 keys, file={tmp_path / 'k'})"


@pytest.mark.parametrize(("headers", "key"), cases(__file__, "test_bearer"))
def test_bearer(headers: list[str], key: str | None) -> None:
    """A key is read from one bearer header, and from nothing else."""
    assert bearer(headers) == key


@pytest.mark.parametrize(("headers", "key"), cases(__file__, "test_a_key_has_two_headers"))
def test_a_key_has_two_headers(headers: dict[str, str], key: str | None) -> None:
    """A key over HTTP may come in Anthropic's header, or in both headers with the same value."""
    assert key_of([(name.encode(), value.encode()) for name, value in headers.items()]) == key


@pytest.mark.parametrize(("address", "local"), cases(__file__, "test_what_is_this_machine"))
def test_what_is_this_machine(address: str, local: bool) -> None:
    """Only loopback and Unix sockets cannot be reached from elsewhere."""
    assert is_local(address) is local


def test_no_api_is_open_by_accident() -> None:
    """Beyond this machine keys, a client CA or --insecure is required; the refusal names them all."""
    with pytest.raises(SettingsInvalid) as caught:
        open_guard(BuilderSettings(), "127.0.0.1:1", "0.0.0.0:2")
    message = str(caught.value)
    assert message.startswith("0.0.0.0:2 can be reached")
    assert all(cure in message for cure in ("--keys-file", "LORAMUX_TLS_CLIENT_CA", "127.0.0.1", "--insecure"))
    assert open_guard(BuilderSettings(), "127.0.0.1:1").keyring is None
    assert open_guard(BuilderSettings(insecure=True), "0.0.0.0:2").label == "nobody"


def test_keys_open_apis_beyond_this_machine() -> None:
    """A service with keys may listen anywhere, and warns that without TLS they can be overheard."""
    line = lines(new_entry("ci", "infer")[1])
    with structlog.testing.capture_logs() as logs:
        guard = open_guard(BuilderSettings(api_keys=line), "0.0.0.0:2")  # type: ignore[arg-type]
    assert guard.label == "API keys"
    assert [each["addresses"] for each in logs] == [["0.0.0.0:2"]]


def test_half_of_tls_is_refused(tmp_path: Path) -> None:
    """A certificate, a key or an authority alone is refused with the settings that are missing."""
    for fields in ({"tls_cert": tmp_path}, {"tls_key": tmp_path}, {"tls_client_ca": tmp_path}):
        with pytest.raises(SettingsInvalid, match="both LORAMUX_TLS_CERT and LORAMUX_TLS_KEY"):
            open_guard(BuilderSettings(**fields), "127.0.0.1:1")  # type: ignore[arg-type]
