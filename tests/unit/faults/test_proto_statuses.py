"""The failures in the protos, against the faults of the code."""

import ast
import inspect
import re
import textwrap
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest

from builder_service.builds.builds import Builds
from builder_service.builds.pushes import Pushes
from builder_service.pipeline.check import Checks
from inference_service.adapters.manager import AdapterManager
from inference_service.adapters.texts import AdapterTexts
from inference_service.api.requests.service import GenerationService
from inference_service.api.rpc.mapping import request_from_message
from inference_service.api.rpc.pooling import requests_from_message
from loramux import faults
from loramux_shared.codes import CODES, CURES
from loramux_shared.faults import FAULTS
from loramux_shared.rpc import calls
from loramux_shared.rpc.status import unreachable
from loramux_shared.sources.base import Source
from tests.support.cases import cases
from tests.support.root import ROOT

PROTOS = sorted((ROOT / "protos").glob("loramux/*/v1/*.proto"))
_LINE = re.compile(r"^ *// (?P<status>[A-Z_]{6,}) +(?P<reason>[A-Z_]{4,})[:,]", re.MULTILINE)
_MORE = re.compile(r"(?<=[ ,])(?P<reason>[A-Z]+(?:_[A-Z]+)+)(?=[:,])")
EVERYWHERE = {"UNAUTHENTICATED", "PERMISSION_DENIED", "SHUTTING_DOWN", "REQUEST_INVALID", "CLIENT_STALLED"}
ELSEWHERE = {
    "SERVER_UNAVAILABLE",  # a client's own word
    "SETTINGS_INVALID",  # ends a process, as the next does
    "PROOF_FAILED",
    "BUILD_INTERRUPTED",  # the build continues when the builder starts again
    *("FILE_NOT_FOUND", "BATCH_NOT_FOUND", "BATCH_CORRUPT"),  # of routes of HTTP
    "HOST_REFUSED",  # of HTTP: no browser speaks gRPC
    "INTERNAL",  # nobody's intention
}


OWNERS = (
    AdapterManager,
    AdapterTexts,
    Builds,
    Checks,
    GenerationService,
    Pushes,
    request_from_message,
    requests_from_message,
)
RPCS = {
    rpc: [attrgetter(path)(SimpleNamespace(**{each.__name__: each for each in OWNERS})) for path in paths]
    for rpc, paths in cases(__file__, "RPCS").items()
}
"""Functions that each rpc calls, whose docstrings name their faults."""
CLASSES = {kind.__name__: reason for reason, kind in FAULTS.items()}


def reasons_in(text: str) -> set[str]:
    """Return the reasons of the faults whose classes a text names."""
    return {CLASSES[word] for word in re.findall(r"\w+", text) if word in CLASSES}


def told_of(rpc: str) -> set[str]:
    """The reasons that the comment above an rpc names."""
    [text] = [text for path in PROTOS if f"  rpc {rpc}(" in (text := path.read_text(encoding="utf-8"))]
    above = text[: text.index(f"  rpc {rpc}(")].rpartition("\n\n")[2]
    table = above[first.start() :] if (first := _LINE.search(above)) else ""
    return {match["reason"] for match in (*_LINE.finditer(table), *_MORE.finditer(table))} & set(FAULTS)


def raised_in(source: str) -> set[str]:
    """The reasons of the faults that code raises itself."""
    raises = [node.exc for node in ast.walk(ast.parse(textwrap.dedent(source))) if isinstance(node, ast.Raise)]
    return set().union(*(reasons_in(ast.unparse(each.func)) for each in raises if isinstance(each, ast.Call)))


@pytest.mark.parametrize("rpc", RPCS)
def test_an_rpc_says_what_it_raises(rpc: str) -> None:
    """The comment names exactly the reasons of the functions it calls; those of every rpc are listed once."""
    raised = set().union(*(reasons_in((call.__doc__ or "").partition("Raises:")[2]) for call in RPCS[rpc]))
    assert told_of(rpc) - EVERYWHERE == raised - EVERYWHERE


def test_every_rpc_is_looked_at() -> None:
    """The table above has all RPCs, and the docstring of each call lists the faults that the code raises."""
    texts = "".join(path.read_text(encoding="utf-8") for path in PROTOS)
    assert set(re.findall(r"^ +rpc (\w+)\(", texts, re.MULTILINE)) == set(RPCS)
    for call in [call for several in RPCS.values() for call in several]:
        assert raised_in(inspect.getsource(call)) <= reasons_in(call.__doc__ or ""), call


def test_what_lies_before_every_rpc_is_reported_for_all() -> None:
    """The interceptor's own refusals are those of the header."""
    assert raised_in(inspect.getsource(calls)) <= EVERYWHERE


def test_a_check_says_what_sources_raise() -> None:
    """The proto's CheckAdapter lists every reason that a source raises."""
    assert reasons_in(Source.__doc__ or "") <= told_of("CheckAdapter")


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.stem)
def test_reasons_stand_beside_their_status(path: Path) -> None:
    """A reason that a comment names is one of ours, and has the status beside which it stands."""
    found = list(_LINE.finditer(path.read_text(encoding="utf-8")))
    assert len(found) > 5
    for line in found:
        assert FAULTS[line["reason"]].status.name == line["status"], line[0]


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.stem)
def test_what_every_rpc_can_end_with_is_reported(path: Path) -> None:
    """Keys and draining are reported once, for the whole service."""
    text = path.read_text(encoding="utf-8")
    header = text[: text.index("\nservice ")]
    assert {line["reason"] for line in _LINE.finditer(header)} == EVERYWHERE


def test_no_reason_is_missing() -> None:
    """Every failure that a caller can meet is named in a proto."""
    texts = "".join(path.read_text(encoding="utf-8") for path in PROTOS)
    named = {match["reason"] for match in (*_LINE.finditer(texts), *_MORE.finditer(texts))}
    assert set(FAULTS) - ELSEWHERE - named == set()


PACKAGES = ("shared/loramux_shared", "builder_service", "loramux", "inference_service")


def codes_in(path: Path) -> list[str]:
    return re.findall(r'"([EW]_[A-Z0-9]+(?:_[A-Z0-9]+)*)"', path.read_text(encoding="utf-8"))


def test_every_code_that_is_used_has_a_page_entry_and_the_reverse():
    """A code without an explanation and an explanation without a code are both mistakes."""
    of_extensions = {"E_BAD_NPY", "W_GATE_UP", "W_TRUNCATED"}
    used = {
        code
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "codes.py" and "v1" not in path.parts
        for code in codes_in(path)
    }
    assert used | of_extensions == set(CODES)


def test_every_reason_has_a_cure_and_the_reverse():
    """Cures and reasons of failures are the same set."""
    assert set(CURES) == set(FAULTS)


def test_who_died_in_the_middle_is_not_asked_for_tls() -> None:
    """A closed connection is a sign of TLS while it is made, and none after something was heard."""
    connecting = "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:1.2.3.4:1: Socket closed"
    assert unreachable("a:1", connecting).endswith("Does it speak TLS? Then its address is grpcs://a:1")
    assert unreachable("a:1", "Stream removed (Socket closed)").endswith("Is it running?")


def test_every_failure_can_be_named_by_a_client() -> None:
    """Every failure is a public class of the module of faults."""
    assert [each.__name__ for each in FAULTS.values() if not hasattr(faults, each.__name__)] == []
