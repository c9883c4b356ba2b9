"""The command line's options for the HTTP APIs."""

from __future__ import annotations

from loramux.cli.local.services import inference_command


def test_the_api_is_open_where_it_is_asked_for() -> None:
    """The flag reaches the service, and without it the HTTP APIs stay closed."""
    assert "--http" not in inference_command("d", None, None, [], {})
    command = inference_command("d", None, None, [], {}, "127.0.0.1:8000")
    assert command[command.index("--http") + 1] == "127.0.0.1:8000"
