"""Completion, by the protocol that shells speak."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.fake_services import Fakes

PROGRAM = [
    sys.executable,
    "-c",
    "import sys; sys.argv[0] = 'loramux'; from loramux.cli.main import main; main()",
]


def complete(*words: str) -> list[str]:
    """Return what bash would offer for the last word."""
    asked = {
        "COMP_WORDS": " ".join(["loramux", *words]),
        "COMP_CWORD": str(len(words)),
        "_LORAMUX_COMPLETE": "complete_bash",
    }
    done = subprocess.run(PROGRAM, env={**os.environ, **asked}, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.split()


def test_commands_and_flags_complete() -> None:
    """A beginning becomes the commands, and a dash the flags."""
    assert complete("dep") == ["deployments"]
    assert "--concurrency" in complete("bench", "--c")


def test_models_of_a_running_server_complete(fakes: Fakes) -> None:
    """Names come from the server that the line names; without one there are none, and no error."""
    assert complete("chat", "--grpc", fakes.inference_address, "lora") == ["lora1", "lora2"]
    assert complete("bench", "--grpc", fakes.inference_address, "--model", "b") == ["base"]
    assert complete("chat", "--grpc", "127.0.0.1:1", "lora") == []
