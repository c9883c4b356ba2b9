"""When traces are sent, and what is said when they cannot be."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import structlog
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from loramux_shared.tracing.otel import Tracing
from loramux_shared.tracing.setup import open_tracing


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


def opened(monkeypatch: pytest.MonkeyPatch, **variables: str) -> tuple[Tracing | None, list[Any]]:
    """Tracing as an environment asks for it, and the log."""
    for name, value in variables.items():
        monkeypatch.setenv(f"OTEL_{name}", value)
    with structlog.testing.capture_logs() as lines:
        return open_tracing("loramux-test"), lines


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"TRACES_EXPORTER": "none"},
        {"TRACES_EXPORTER": "none", "EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"},
        {"TRACES_EXPORTER": "console", "SDK_DISABLED": "true"},
        {"EXPORTER_OTLP_ENDPOINT": ""},
    ],
)
def test_nobody_asks(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a variable that asks for traces, or with one that forbids them, nothing is sent or said."""
    assert opened(monkeypatch, **variables) == (None, [])


@pytest.mark.parametrize(
    ("variables", "exporter"),
    [
        ({"TRACES_EXPORTER": "nowhere"}, "nowhere"),
        ({"EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "EXPORTER_OTLP_PROTOCOL": "smoke"}, "smoke"),
    ],
)
def test_an_exporter_that_is_missing(
    variables: dict[str, str], exporter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line names the exporter and the cure, and the service goes on without traces."""
    tracing, [line] = opened(monkeypatch, **variables)
    assert tracing is None
    assert (line["log_level"], line["exporter"]) == ("warning", exporter)
    assert line["cure"].startswith("pip install 'loramux[otel]'")


@pytest.mark.parametrize(("variable", "name"), [({}, "loramux-test"), ({"OTEL_SERVICE_NAME": "mine"}, "mine")])
def test_spans_are_sent_when_it_closes(variable: dict[str, str], name: str) -> None:
    """A standard exporter gets what is left at the end; OTEL_SERVICE_NAME comes before the own name."""
    code = (
        "from loramux_shared.tracing.setup import open_tracing\n"
        "tracing = open_tracing('loramux-test')\n"
        "with tracing.call('a call', {}, {'n': 1}): pass\n"
        "tracing.close()"
    )
    environment = os.environ | {"OTEL_TRACES_EXPORTER": "console"} | variable
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "traces are sent" in ended.stdout
    assert '"name": "a call"' in ended.stdout
    assert f'"service.name": "{name}"' in ended.stdout


def test_what_the_sdk_says_is_in_the_log() -> None:
    """A problem of OpenTelemetry's own is a line of the log, and not a stray line beside it."""
    Tracing.to(InMemorySpanExporter(), "loramux-test").close()
    with structlog.testing.capture_logs() as lines:
        logging.getLogger("opentelemetry.exporter").warning("nobody answers at %s", "http://there")
    assert lines == [{"event": "tracing", "problem": "nobody answers at http://there", "log_level": "warning"}]


def test_nothing_of_it_is_needed() -> None:
    """Both services start without OpenTelemetry: nothing of it is imported before it is asked for."""
    code = (
        "import sys, inference_service.__main__, builder_service.__main__\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
