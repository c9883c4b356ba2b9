"""The lines to try that ``up`` and the demo print."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
from google.protobuf.json_format import ParseDict

from loramux.cli.local.tree import listening_address
from loramux.cli.local.up import program, reachable, show_lines_to_try
from loramux.inference.v1 import inference_pb2 as pb


def test_the_lines_work_as_they_stand(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a chat with a limit, at an address that can be reached, with the key where one is used."""
    monkeypatch.setenv("LORAMUX_API_KEY", "lmx_x")
    show_lines_to_try("0.0.0.0:50060", "[::]:8123", "lora1")
    text = capsys.readouterr().out.removeprefix("try\n")
    chat, python, curl, grpcurl = (shlex.split(block) for block in text.replace("\\\n", " ").split("\n\n"))
    assert chat[1:] == ["chat", "lora1", "--grpc", "127.0.0.1:50060"]
    compile(python[2], "hint", "exec")
    assert (
        'Client("127.0.0.1:50060").complete("lora1", [{"role": "user", "content": "Hi"}], max_tokens=64)'
        in (python[2])
    )
    assert curl[:4] == [
        *("curl", "http://127.0.0.1:8123/v1/chat/completions"),
        *("-H", "authorization: Bearer $LORAMUX_API_KEY"),
    ]
    assert json.loads(curl[-1])["max_tokens"] == 64
    request = ParseDict(json.loads(grpcurl[grpcurl.index("-d") + 1]), pb.GenerateRequest())
    assert request.sampling.max_tokens == 64
    assert [turn.role for turn in request.messages.messages] == ["user"]
    assert grpcurl[-2:] == ["127.0.0.1:50060", "loramux.inference.v1.InferenceService/Generate"]


def test_without_a_key_none_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hints without keys have no header for one, and leave the usual address out."""
    monkeypatch.delenv("LORAMUX_API_KEY", raising=False)
    show_lines_to_try("127.0.0.1:50052", "127.0.0.1:8000", "lora1")
    text = capsys.readouterr().out
    assert "authorization" not in text
    assert "--grpc" not in text
    assert "Client()" in text


def test_programs_are_named_as_the_shell_finds_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hint has the program's name where PATH finds this environment, else its path, relative if below."""
    folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(folder))
    assert program(Path(sys.executable).name) == Path(sys.executable).name
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program("loramux") in (str(folder / "loramux"), ".venv/bin/loramux")
    monkeypatch.chdir(folder.parent)
    assert program("loramux") == "bin/loramux"


def test_an_address_of_all_is_reached_as_this_machine() -> None:
    """A wildcard becomes the loopback; other addresses stay."""
    assert reachable("0.0.0.0:1") == "127.0.0.1:1"
    assert reachable("10.0.0.1:1") == "10.0.0.1:1"


def test_port_0_is_a_free_port_of_the_same_host() -> None:
    """An address with port 0 keeps its host, another one stays, and without one it is a local one."""
    host, _, port = listening_address("10.0.0.4:0", "127.0.0.1:50052").rpartition(":")
    assert (host, int(port) > 0) == ("10.0.0.4", True)
    assert listening_address("10.0.0.4:7", "127.0.0.1:50052") == "10.0.0.4:7"
    assert listening_address("", "127.0.0.1:0").startswith("127.0.0.1:")
