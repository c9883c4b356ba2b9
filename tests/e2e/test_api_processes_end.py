"""A service with API processes: it drains at a signal, and its API processes end with it."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from loramux import Client
from tests.support.openai_api import openai_world
from tests.support.processes.forks import inference_service
from tests.support.processes.inference import flags_of, run_inference
from tests.support.tiny import World
from tests.support.waiting import BOUND_S, wait_until

CHAT = {"model": "wide", "messages": [{"role": "user", "content": "x"}], "max_tokens": 100, "temperature": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny model with adapters, and a store in its folder."""
    made, memory = openai_world(tmp_path_factory.mktemp("apis"))
    for key in memory.list(""):
        path = made.root / "store" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(memory.get(key))
    return made


def _children(pid: int) -> list[psutil.Process]:
    return [
        each
        for each in psutil.Process(pid).children()
        if "inference_service.api.processes.api" in each.cmdline()
    ]


def _text(url: str) -> str:
    answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=BOUND_S)
    return str(answer.json()["choices"][0]["message"]["content"])


def test_a_service_with_api_processes_drains(world: World, tmp_path: Path) -> None:
    """Answers are those without API processes, operators' calls work, and SIGTERM cuts no accepted request."""
    with run_inference(world, tmp_path) as (_, ready):
        alone = _text(f"http://{ready['http']}")
    with run_inference(world, tmp_path, LORAMUX_API_PROCESSES="2") as (process, ready):
        url = f"http://{ready['http']}"
        assert [_text(url) for _ in range(8)] == [alone] * 8
        pinned = httpx.post(f"{url}/v1/adapters/wide/pin", timeout=BOUND_S)
        assert pinned.json()["pinned"]
        with Client(ready["grpc"]) as client:
            assert {"base", "wide"} <= {model.name for model in client.models()}
            assert client.adapters()
        assert len(_children(process.pid)) == 2
        body: dict[str, Any] = CHAT | {"stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=BOUND_S) as answer:
            process.send_signal(signal.SIGTERM)
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        pieces = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        assert "".join(each["choices"][0]["delta"].get("content") or "" for each in pieces) == alone
        assert process.wait() == 0


def test_a_signal_ends_a_start_whose_api_process_imports(world: World, tmp_path: Path) -> None:
    """A service that waits for an API process to listen ends at once, and the process with it."""
    hangs = "import sys, time\nif 'inference_service.api.processes.api' in sys.orig_argv:\n"
    hangs += "    sys.meta_path.insert(0, time)\n"
    hangs += "time.find_spec = lambda name, *_: time.sleep(1e6 if name == 'asyncio' else 0)\n"
    (tmp_path / "sitecustomize.py").write_text(hangs)
    settings = {"LORAMUX_API_PROCESSES": "1", "LORAMUX_KV_MEMORY_GB": "0.01", "PYTHONPATH": str(tmp_path)}
    flags = flags_of(world, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0")
    process = inference_service(flags, tmp_path / "log", {**os.environ, **settings}, None)
    [child] = wait_until(lambda: _children(process.pid), "the API process")
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    wait_until(lambda: not child.is_running(), "the end of the API process")


def test_api_processes_end_with_the_engines(world: World, tmp_path: Path) -> None:
    """API processes end by themselves after a kill -9 of the engine's process."""
    with run_inference(world, tmp_path, LORAMUX_API_PROCESSES="1") as (process, ready):
        children = _children(process.pid)
        httpx.post(f"http://{ready['http']}/pause", params={"mode": "keep"}, timeout=BOUND_S)
        process.kill()
        process.wait()
        wait_until(lambda: not any(each.is_running() for each in children), "the end of the API process")
        assert children
