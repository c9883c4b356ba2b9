"""``loramux chat``: answers to the lines of a pipe, completions, and a conversation on a terminal."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests.e2e.test_cli_processes import on_a_terminal
from tests.support.processes.commands import run, start_command
from tests.support.services.fake_grpc import Fakes
from tests.support.waiting import BOUND_S, wait_until
from tests.unit.cli.test_cli_commands import completions


def test_chat_answers_each_line_of_a_pipe(fakes: Fakes) -> None:
    """Each line of piped input is a separate conversation."""
    code, text, _ = run("chat", "lora1", "--grpc", fakes.inference_address, text="hello\n\nagain\n")
    assert code == 0
    assert text == "the grey sea sings (1)\n" * 2


def test_chat_with_nobody(fakes: Fakes) -> None:
    """An unknown model is an error that lists the served models, and names a near one."""
    code, _, errors = run("chat", "nobody", "--grpc", fakes.inference_address, text="hello\n")
    assert code == 1
    assert errors == "error: MODEL_NOT_FOUND: no model 'nobody'; served are base, lora1, lora2.\n"
    assert "Did you mean lora1?" in run("chat", "lora01", "--grpc", fakes.inference_address)[2]
    code, _, errors = run("chat", "lora2*0.7 + nobody*0.5", "--grpc", fakes.inference_address, text="hello\n")
    assert (code, errors.partition(";")[0]) == (1, "error: MODEL_NOT_FOUND: no model 'nobody'")
    run("chat", "lora2*0.7 + lora1", "--grpc", fakes.inference_address, text="hello\n")
    assert fakes.inference.requests[-1].model == "lora2*0.7 + lora1"


def test_chat_without_a_name_is_with_the_first_model(fakes: Fakes) -> None:
    """The base answers where no model is named."""
    assert run("chat", "--grpc", fakes.inference_address, text="hello\n")[0] == 0
    assert fakes.inference.requests[-1].model == "base"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["--temp"], ["--temperature"]),
        (["--grpc", "HERE", "lora"], ["lora1", "lora2"]),
        (["--grpc", "127.0.0.1:1", "lora"], []),
    ],
)
def test_words_complete(fakes: Fakes, words: list[str], offered: list[str]) -> None:
    """Flags complete, and models of the server that the line names, or none without an error."""
    words = [fakes.inference_address if word == "HERE" else word for word in words]
    assert completions("chat", *words) == (offered, "")


def test_ctrl_c_is_quiet(fakes: Fakes, tmp_path: Path) -> None:
    """Ctrl-C while an answer is waited for is exit code 130, with no word about it."""
    before = len(fakes.inference.requests)
    with start_command(tmp_path, "chat", "base", "--grpc", fakes.inference_address) as command:
        os.write(command.stdin, b"wait\n")
        wait_until(lambda: len(fakes.inference.requests) > before, "a request", lambda: command.errors)
        assert command.end(signal.SIGINT) == 130
        assert "Traceback" not in command.errors


def test_closed_stdin(fakes: Fakes, tmp_path: Path) -> None:
    """A chat whose stdin is closed says so in one line."""
    with start_command(tmp_path, "chat", "base", "--grpc", fakes.inference_address, stdin=False) as command:
        assert command.end() == 1
        assert command.errors == (
            "error: REQUEST_INVALID: stdin is closed. Pipe prompts into it, or run it in a terminal\n"
        )


def test_a_conversation(fakes: Fakes, tmp_path: Path) -> None:
    """A chat keeps history, completes names, changes models, and survives wrong ones, Ctrl-C and Ctrl-D."""
    fakes.inference.cancelled.clear()
    typed = [b"one", b"two", b"/system be brief", b"three", b"/clear", b"\x1b[A\x1b[A", b"/model lo\t2"]
    typed += [b"four", b"/model lora22", b"/models", b"/help", b"/modle x", b"wait"]
    dialogue = [("> ", line + b"\n") for line in typed]
    dialogue += [("the ", b"\x03"), ("> ", b"hello\n"), ("> ", b"\x04")]
    args = ["chat", "lora1", "--grpc", fakes.inference_address]
    text = on_a_terminal(args, {"XDG_STATE_HOME": str(tmp_path)}, dialogue)
    stated = [[turn.content for turn in request.messages.messages] for request in fakes.inference.requests[-7:]]
    assert [turns[-1] for turns in stated] == ["one", "two", "three", "three", "four", "wait", "hello"]
    assert stated[2][0] == stated[3][0] == stated[4][0] == "be brief"
    assert [len(turns) for turns in stated] == [1, 3, 6, 2, 4, 6, 8]
    assert re.findall(r"sings \((\d)\)", text) == ["1", "3", "6", "2", "4", "8"]
    assert "lora2> " in text
    assert "* lora2" in text
    assert "error: MODEL_NOT_FOUND: no model 'lora22'; served are base, lora1, lora2." in text
    assert "no command /modle" in text
    assert "stopped" in text
    assert fakes.inference.cancelled.wait(BOUND_S)
    assert "two\n" in (tmp_path / "loramux/chat_history").read_text()
