import json
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import Fault, SourceUnavailable
from loramux_shared.sources.hub import HubSource
from loramux_shared.sources.retry import RetryPolicy
from loramux_shared.sources.secrets import Secrets
from tests.support.hub import HubRepo, serve_hub

CANARY = "canary7d1f"
PATIENCE = RetryPolicy(attempts=2, wait_s=0.01)


@contextmanager
def silence(caplog: pytest.LogCaptureFixture, *secrets: str) -> Iterator[None]:
    """Fail if a secret is in a fault of the block, in its traceback, or in any log down to INFO."""
    caplog.set_level(logging.INFO)
    stated: list[Any] = []
    with capture_logs() as logs, pytest.raises(Fault) as failure:
        yield
    fault = failure.value
    stated += [str(fault), repr(fault), *fault.findings, logs, caplog.text]
    stated += traceback.format_exception(fault)
    text = "\n".join(map(str, stated))
    assert [secret for secret in (CANARY, *secrets) if secret in text] == []


def secrets_of(value: dict[str, str] | str) -> Secrets:
    return Secrets(None, {"LORAMUX_SECRET_key": value if isinstance(value, str) else json.dumps(value)})


def repo(kind: str, address: str, **fields: str) -> Repository:
    """A repository that is opened by the secret `key`."""
    return Repository(source=SourceKind(kind), repo=address, **({"runtime_secret_name": "key"} | fields))


def test_hf(caplog):
    """The hub's token is in no failure: gated, absent, private, busy, or no repository id."""
    with serve_hub() as hub:
        hub.repos["org/gated"] = HubRepo({"main": "c" * 40}, {}, token="another", gated=True)  # noqa: S106 - small hub
        source = HubSource(secrets_of(CANARY), endpoint=hub.endpoint, patience=PATIENCE)
        for name in ("org/gated", "org/absent", "a//b"):
            with silence(caplog):
                source.resolve(repo("HF", name))
        hub.failures[:] = [500, 500]
        with silence(caplog):
            source.resolve(repo("HF", "org/gated"))


def test_hf_storage(caplog, tmp_path, monkeypatch):
    """The hub's signed addresses are neither in failures nor in the logs of its client."""
    logger = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(logger, "propagate", True)
    with serve_hub() as hub:
        hub.repos["org/a"] = HubRepo({"main": "c" * 40}, {"a": b"x"}, signature=CANARY)
        patience = RetryPolicy(attempts=1, answer_s=0.1)
        source = HubSource(secrets_of(CANARY), endpoint=hub.endpoint, patience=patience)
        resolved = source.resolve(repo("HF", "org/a"))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        with silence(caplog):
            source.fetch(resolved, ["a"], tmp_path)
    assert any(path.startswith("/storage/") for _, path in hub.requests)


def test_representations():
    """The representations of a repository and of secrets hide the secret parts."""
    secrets = secrets_of(CANARY)
    for address in (f"https://h/x?sig={CANARY}", f"https://u:{CANARY}@h/x", f"https://h/x#{CANARY}"):
        expected = repo("REMOTE_URL", address)
        assert CANARY not in f"{expected!r} {expected} {[expected]} {expected.label} {secrets!r} {secrets}"
    assert CANARY not in repr(SourceUnavailable(expected.label))
