"""Completion, by the protocol that shells speak."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from loramux.cli.main import app
from tests.support.fake_services import Fakes


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["dep"], ["deployments"]),
        (["chat", "--temp"], ["--temperature"]),
        (["chat", "--grpc", "HERE", "lora"], ["lora1", "lora2"]),
        (["chat", "--grpc", "127.0.0.1:1", "lora"], []),
    ],
)
def test_words_complete(fakes: Fakes, words: list[str], offered: list[str]) -> None:
    """Commands and flags complete, and models of the server that the line names, or none without an error."""
    words = [fakes.inference_address if word == "HERE" else word for word in words]
    requests = {
        "COMP_WORDS": " ".join(["loramux", *words]),
        "COMP_CWORD": str(len(words)),
        "_LORAMUX_COMPLETE": "complete_bash",
    }
    ended = CliRunner().invoke(app, [], prog_name="loramux", env=requests)
    assert (ended.stdout.split(), ended.stderr) == (offered, "")
