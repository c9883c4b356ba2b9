"""Export of traces, and the messages when the export fails."""

import logging
import os
import sys
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import structlog

from loramux_shared.tracing import Tracing, open_tracing
from tests.e2e.test_api_processes import replica
from tests.support.cases import cases
from tests.support.http_server import QuietHandler, serve_http
from tests.support.processes.forks import Forked
from tests.support.waiting import BOUND_S, bounded


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


def opened(monkeypatch: pytest.MonkeyPatch, **variables: str) -> tuple[Tracing | None, list[Any]]:
    for name, value in variables.items():
        monkeypatch.setenv(f"OTEL_{name}", value)
    with structlog.testing.capture_logs() as lines:
        return open_tracing("loramux-test"), lines


@pytest.mark.parametrize("variables", cases(__file__, "SILENT"))
def test_nobody_asks(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a variable asks for traces and none forbids them, nothing is sent or logged."""
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
    """A missing exporter is a line with the exporter and the cure; the service continues without traces."""
    tracing, [line] = opened(monkeypatch, **variables)
    assert tracing is None
    assert (line["log_level"], line["exporter"]) == ("warning", exporter)
    assert line["cure"].startswith("pip install 'loramux[otel]'")


def test_what_the_sdk_says_is_in_the_log() -> None:
    """A problem of OpenTelemetry's own is a line of the log, and not a stray line beside it."""
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from loramux_otel.tracing import Tracing

    Tracing.to(InMemorySpanExporter(), "loramux-test").close()
    with structlog.testing.capture_logs() as lines:
        logging.getLogger("opentelemetry.exporter").warning("nobody answers at %s", "http://there")
    assert lines == [{"event": "tracing", "problem": "nobody answers at http://there", "log_level": "warning"}]


def _sees_nothing_of_it() -> None:
    """End with 1 where something of OpenTelemetry is imported, in a fork that has imported both services."""
    assert {"inference_service.process", "builder_service.__main__"} <= sys.modules.keys()
    os._exit(any(name.startswith("opentelemetry") for name in sys.modules))


def test_nothing_of_it_is_needed() -> None:
    """The services start without OpenTelemetry, and import nothing of OpenTelemetry before tracing is set."""
    assert Forked(_sees_nothing_of_it).wait(BOUND_S) == 0


async def test_an_api_process_sends_its_spans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that an API process answers is a span below its client's, sent at the latest at the drain."""
    received: list[bytes] = []

    class Collector(QuietHandler):
        def do_POST(self) -> None:  # noqa: N802 - the base class's name
            received.append(self.rfile.read(int(self.headers["content-length"])))
            self.answer(200)

    with serve_http(ThreadingHTTPServer(("127.0.0.1", 0), Collector)) as address:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{address}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        async with replica(tmp_path, 1) as apart:
            stream = await apart.stream(2)
            async with bounded("the end of the answer"):
                await stream.reader.readuntil(b"[DONE]")
            stream.close()
    assert b"POST /v1/completions" in b"".join(received)
