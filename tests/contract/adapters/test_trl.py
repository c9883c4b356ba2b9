"""The trainer's own client and rollout loop: a new adapter at each step, and the tokens that it trains on."""

import asyncio
import multiprocessing
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from loramux_shared.storage.open import open_store
from tests.support.processes.watching import kill_at_end
from tests.support.s3_gateway import free_port
from tests.support.tiny import ADAPTERS, SIZES, World, make_world_of, oracle
from tests.support.waiting import BOUND_S

trl = pytest.importorskip("trl", reason="the trainer is an extra: pip install 'loramux[trl]'")
aiohttp = pytest.importorskip("aiohttp", reason="the trainer is an extra: pip install 'loramux[trl]'")

pytestmark = pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
VERSIONS = 50
CACHED = 4
"""Versions that the trainer leaves loaded, for rollouts that began with them."""
PROMPT = [5, 6, 7, 8]
TEMPERATURE = 0.7
SETTINGS = {
    "LORAMUX_KV_MEMORY_GB": "0.01",
    "LORAMUX_DTYPE": "float32",
    "LORAMUX_ADAPTER_MEMORY_GB": "0.0005",
    "LORAMUX_LOGPROBS_MODE": "processed",
}


@dataclass
class Rollouts:
    """TRL's own rollout loop, whose requests are watched."""

    loop: Any
    digests: list[str] = field(default_factory=list)
    """Digests of the answers, as they came."""

    async def turn(self) -> tuple[list[int], list[float]]:
        """Generate once; the tokens and their log probabilities."""
        ids, logprobs = await self.loop._generate_one_turn(PROMPT)
        return list(ids), list(logprobs)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A base, and a first policy."""
    root = tmp_path_factory.mktemp("trl")
    world = make_world_of(root, LlamaConfig(**SIZES), {"policy": ADAPTERS["all"]})
    world.build(open_store(f"file://{root}/store"))
    return world


@pytest.fixture(scope="module")
def url(world: World) -> Iterator[str]:
    """The URL of a replica that asks a builder, both as processes."""
    building, serving, web = (f"127.0.0.1:{free_port()}" for _ in range(3))
    shared = ["--store", f"file://{world.root}/store", "--local-root", str(world.root)]
    with (
        _process(world.root, "builder_service", "--grpc", building, *shared),
        _process(
            world.root,
            *("inference_service", "--deployment", "tiny", "--grpc", serving, "--http", web),
            *("--builder", building, "--threads", "1", *shared),
        ),
    ):
        yield f"http://{web}"


@contextmanager
def _process(folder: Path, module: str, *flags: str) -> Iterator[None]:
    usual = {name: value for name, value in os.environ.items() if not name.startswith("LORAMUX_")}
    settings = SETTINGS if module == "inference_service" else {}
    with (folder / f"{module}.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", module, *flags], stderr=log, env=usual | settings)
    with kill_at_end(process):
        yield


def save_version(world: World, number: int) -> Path:
    """Save the policy after so many steps."""
    folder = world.root / "steps" / str(number)
    folder.mkdir(parents=True)
    first = world.adapters["policy"]
    (folder / "adapter_config.json").write_bytes((first / "adapter_config.json").read_bytes())
    tensors = load_file(first / "adapter_model.safetensors")
    grown = {name: value * (1 + number / 20) if "lora_B" in name else value for name, value in tensors.items()}
    save_file(grown, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def open_loop(url: str, version: Any) -> Any:
    """TRL's rollout loop as TRL's worker makes it, without a dataset."""
    from trl.experimental.async_grpo.async_rollout_worker import _AsyncRolloutLoop

    return _AsyncRolloutLoop(
        model_name="base",
        dataset=[{"prompt": "unused"}],
        reward_funcs=[no_reward],
        processing_class=SimpleNamespace(response_template="unused"),
        eos_token_ids=[2],
        rollout_buffer=queue.Queue(),
        model_version_value=version,
        heartbeat_value=multiprocessing.Value("d", 0.0),
        failed_event=threading.Event(),
        exception_info_queue=queue.Queue(),
        metrics_queue=queue.Queue(),
        vllm_server_url=url,
        lora_name="policy",
        max_tokens=6,
        temperature=TEMPERATURE,
    )


def no_reward(**_: Any) -> list[float]:
    return []


def digest_of(url: str, name: str) -> str:
    listed = requests.get(f"{url}/v1/adapters", params={"page_size": 100}, timeout=BOUND_S).json()["data"]
    [found] = [each for each in listed if each["id"] == name]
    return str(found["digest"])


def logprobs_of(model: Any, answer: list[int]) -> list[float]:
    """Return the log probabilities of an answer's tokens by transformers and PEFT, after temperature."""
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + answer])).logits[0, len(PROMPT) - 1 : -1]
    scores = torch.log_softmax(logits / TEMPERATURE, dim=-1)
    return [float(row[token]) for row, token in zip(scores, answer, strict=True)]


async def test_every_step_is_answered_by_its_own_version(world: World, url: str) -> None:
    """50 versions come and go while rollouts run: digests are those of the names, log probabilities PEFT's."""
    from trl.experimental.async_grpo.vllm_client import VLLMClient

    PartialState()  # the trainer logs by it
    client = VLLMClient(url, server_timeout=BOUND_S)
    await asyncio.to_thread(client.wait_for_server_ready, 0.2)
    assert client.get_server_info()["model_config"]["logprobs_mode"] == "processed_logprobs"
    assert client.get_dtype().removeprefix("torch.") == "float32"  # as the trainer compares it
    assert (client.get_world_size(), client.get_max_model_len()) == (1, 256)
    version = multiprocessing.Value("i", 0)
    rollouts = Rollouts(open_loop(url, version))
    expected: list[str] = []
    tracing = aiohttp.TraceConfig()

    async def ended(session: Any, context: Any, params: Any) -> None:
        rollouts.digests.append(params.response.headers["x-loramux-digest"])

    tracing.on_request_end.append(ended)
    async with aiohttp.ClientSession(trace_configs=[tracing]) as session:
        rollouts.loop.session = session
        for number in range(1, VERSIONS + 1):
            under_way = asyncio.create_task(rollouts.turn()) if number > 1 else None
            await _update(client, f"policy-v{number}", save_version(world, number))
            version.value = number
            if under_way is not None:
                await under_way
                expected.append(expected[-1])
            ids, logprobs = await rollouts.turn()
            expected.append(digest_of(url, f"policy-v{number}"))
            if number in (1, VERSIONS):
                reported = logprobs_of(oracle(world.base, world.root / "steps" / str(number)), ids)
                assert logprobs == pytest.approx(reported, abs=1e-3)
            if number > CACHED:
                client.unload_lora_adapter(f"policy-v{number - CACHED}")
    assert rollouts.digests == expected
    assert len(set(expected)) == VERSIONS
    client.unload_lora_adapter("policy-v1")  # it is gone already, and nobody minds


async def _update(client: Any, name: str, folder: Path) -> None:
    """Bring a version in as the trainer does: between pause and resume."""
    await asyncio.to_thread(client.pause)
    try:
        await asyncio.to_thread(client.load_lora_adapter, name, str(folder))
    finally:
        await asyncio.to_thread(client.resume)


def test_its_client_of_servers_reads_tokens_and_their_log_probabilities(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Online trainers in server mode get texts for ids, and the log probabilities of whole sequences."""
    module = import_module("trl.generation.vllm_client")
    monkeypatch.setattr(module, "is_vllm_available", lambda: True)  # it uses nothing of that package
    client = module.VLLMClient(base_url=url, connection_timeout=BOUND_S)
    assert client.model == "base"
    found = client.generate([PROMPT, PROMPT[:2]], n=2, max_tokens=4, logprobs=2, top_k=-1)
    assert found["prompt_ids"] == [PROMPT, PROMPT[:2]]
    assert [ids[0] for each in found["logprob_token_ids"] for ids in each] != []
    for answer, ids in zip(found["completion_ids"], found["logprob_token_ids"], strict=True):
        assert all(token in rivals for token, rivals in zip(answer, ids, strict=True))
    whole = [PROMPT + found["completion_ids"][0]]
    scored = client.get_sequence_logprobs(whole, [len(PROMPT)], top_logprobs=5)
    assert [ids for [ids] in scored["actual_token_ids"][0]] == found["completion_ids"][0]
