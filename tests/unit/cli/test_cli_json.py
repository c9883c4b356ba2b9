"""``--json``: documents alone on stdout, with failures among them."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from loramux.cli.build_view import BuildLines
from loramux.cli.documents import jsonable
from loramux.records import Stage
from tests.support.commands import run
from tests.support.fake_services import Fakes
from tests.unit.cli.test_build_view import adapter, state


def documents(*args: str, code: int = 0) -> list[Any]:
    """Run a command with ``--json`` and return the documents on stdout, one per line or one in all."""
    status, text, errors = run(*args, "--json")
    assert status == code, errors
    return [json.loads(text)] if text.startswith("{\n") else [json.loads(line) for line in text.splitlines()]


def test_models(fakes: Fakes) -> None:
    [document] = documents("models", "--grpc", fakes.inference_address)
    assert document["schema"] == 2
    assert [model["name"] for model in document["models"]] == ["base", "lora1", "lora2"]
    assert document["models"][1]["ranks"] == [8]


def test_health(fakes: Fakes) -> None:
    [document] = documents("health", fakes.builder_address)
    assert document["status"] == "SERVING"
    assert document["address"] == fakes.builder_address


def test_a_build_is_a_line_per_state(fakes: Fakes, deployment: Callable[..., str]) -> None:
    """``build`` gives the deployment at each change, the last one as it stayed."""
    path = deployment("lines", "lora1")
    lines = documents("build", path, "--builder", fakes.builder_address)
    assert len(lines) > 2
    assert {line["schema"] for line in lines} == {2}
    last = lines[-1]["deployment"]
    assert (last["state"], last["generation"], last["failure"]) == ("active", 3, None)
    assert last["adapters"][0]["warnings"][0]["code"] == "W_NARROWED"


def test_lines_of_a_build_grow_with_what_happens(capsys: pytest.CaptureFixture[str]) -> None:
    """All adapters at the beginning and at the end, between them those that changed; nothing without news."""
    count = 20
    adapters = [adapter(number, Stage.WAITING) for number in range(count)]
    lines = BuildLines()
    states = [list(adapters)]
    for number in range(count):
        for stage in (Stage.FETCHING, Stage.DONE):
            adapters[number] = adapter(number, stage)
            states.append(list(adapters))
    for found in states:
        for _ in range(2):  # the second time, copies that are equal
            lines.tell(state([replace(each) for each in found]))
    lines.tell(state(adapters, ended=True))
    output = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(line["deployment"]["adapters"]) for line in output] == [count, *[1] * (2 * count), count]
    merged: dict[str, Any] = {}
    for line, found in zip(output, [*states, adapters], strict=True):
        merged |= {each["name"]: each for each in line["deployment"]["adapters"]}
        assert list(merged.values()) == jsonable(found)
        assert sum(line["stages"].values()) == count
    assert output[-1]["stages"] == {"done": count}


def test_a_refused_build_ends_with_its_failure(fakes: Fakes, deployment: Callable[..., str]) -> None:
    """The last line holds the reason and the findings, and the exit code is that of people."""
    path = deployment("refused", "bad")
    *_, state, failed = documents("build", path, "--builder", fakes.builder_address, code=1)
    assert state["deployment"]["failure"]["reason"] == "ADAPTER_INVALID"
    assert failed["error"]["reason"] == "ADAPTER_INVALID"
    assert [finding["code"] for finding in failed["error"]["findings"]] == ["E_RANK_MAX", "E_SHAPE"]
