"""The command line about the OpenAI door."""

from __future__ import annotations

import pytest

from loramux import Client
from loramux.cli.services import inference_command
from loramux.cli.up import show_lines_to_try
from tests.unit.fake_services import Fakes


def test_the_door_is_open_where_it_is_asked_for() -> None:
    """The flag reaches the service, and without it the door stays closed."""
    assert "--http" not in inference_command("d", None, None, [], [])
    command = inference_command("d", None, None, [], [], "127.0.0.1:8000")
    assert command[command.index("--http") + 1] == "127.0.0.1:8000"


def test_a_line_for_curl_is_shown(capsys: pytest.CaptureFixture[str], fakes: Fakes) -> None:
    """It names the address, the route and a model that is served."""
    with Client(inference=fakes.inference_address) as client:
        models = client.models()
    show_lines_to_try("127.0.0.1:50052", "127.0.0.1:8123", models)
    shown = capsys.readouterr().out
    assert "curl http://127.0.0.1:8123/v1/chat/completions" in shown
    assert f'"model": "{models[-1].name}"' in shown
