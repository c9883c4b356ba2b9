"""A replica of two processes: it answers as one process does, and ends in time where a rank fails."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from transformers import LlamaConfig, Olmo2Config, PreTrainedConfig, Qwen3_5TextConfig

from inference_service.adapters.loader import Packer
from inference_service.core.request import Request
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence, StepOutput
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.startup.ranks.host import MODULE, RankHost
from inference_service.startup.ranks.work import RankedPacker
from loramux_shared.bases.read import read_config
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.bundle.manifest import WEIGHTS_FILE
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.faults import BundleCorrupt, InternalFault, ProofFailed, ReplicaFailed, SettingsInvalid
from loramux_shared.process import python
from loramux_shared.runtime import Pooling
from loramux_shared.storage.base import Store
from loramux_shared.storage.open import open_store
from tests.models.test_deterministic import answers as with_logprobs
from tests.models.test_families import PARTS, SETS
from tests.models.test_replayed import Programs
from tests.support.grammars import allow_only
from tests.support.recorded import CountingRecorder
from tests.support.service import Service
from tests.support.thread_ranks import run_in_ranks
from tests.support.tiny import (
    ADAPTERS,
    SIZES,
    VOCAB,
    Replica,
    World,
    make_world_of,
    next_logprobs,
    run_engine,
    sequence,
)
from tests.support.waiting import BOUND_S, result_of, until

DELTA = Qwen3_5TextConfig(**SIZES | PARTS["qwen_delta"], pad_token_id=0)
BIASED = LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)
WORLDS: dict[str, tuple[PreTrainedConfig, dict[str, Any], dict[str, Any]]] = {
    "llama": (LlamaConfig(**SIZES), ADAPTERS, {}),
    "delta": (DELTA, SETS["delta"], {}),
    "olmo2": (Olmo2Config(**SIZES, pad_token_id=0), ADAPTERS, {}),
    "merged": (
        BIASED,
        {"all": ADAPTERS["all"] | {"use_dora": True, "bias": "lora_only"}},
        {"serve_base": False, "merge": "always"},
    ),
}
"""Bases, adapters, and what their deployment says."""
MODELS = ("base", "wide", "all", "rs", "wide*0.7+rs*-0.5")


@pytest.fixture(scope="module", params=["llama"])
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[World, Store]]:
    """A world in a store that other processes read, too."""
    config, adapters, runtime = WORLDS[request.param]
    world = make_world_of(tmp_path_factory.mktemp("ranks"), config, adapters)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LORAMUX_STORE", f"file://{world.root}/store")
        store = open_store(f"file://{world.root}/store")
        world.build_with(store, runtime=runtime)
        yield world, store


def load(built: tuple[World, Store], **settings: Any) -> Replica:
    few = {"adapter_memory_gb": 3e-5, "block_size": 16, "max_batch_tokens": 32, "tensor_parallel": 2}
    return built[0].load(built[1], **few | settings)


def close(ready: Replica) -> None:
    if ready.bank is not None:
        ready.bank.close()
    if isinstance(ready.host, RankHost):
        ready.host.close()
        assert all(not Path(f"/proc/{pid}").exists() for pid in ready.host.pids)


def request(ready: Replica, name: str, draw: random.Random) -> Sequence:
    """A request of any model with any way to draw, or for a vector; its prompt often begins as others do."""
    prompt = [*range(7, 15)][: draw.randrange(9)] + draw.choices(range(3, VOCAB), k=draw.randint(1, 30))
    params = SamplingParams(max_tokens=draw.randint(1, 12))
    others: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "seed": draw.randrange(9)},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logit_bias": {9: 2.0}},
        {"min_tokens": 3, "logprobs": 2},
        {"prompt_logprobs": 1},
    ]
    seq = sequence(ready, name, draw.choice(MODELS), prompt, replace(params, **draw.choice(others)))
    kinds: list[dict[str, Any]] = [
        {"grammar": allow_only(*range(3, 60))},
        {"pooling": Pooling.MEAN, "sampling": SamplingParams(max_tokens=0)},
    ]
    return replace(seq, **draw.choice([{}, {}, *kinds]))


@pytest.mark.parametrize("requests", [24, pytest.param(300, marks=pytest.mark.sweep)])
@pytest.mark.parametrize(("built", "block"), [("llama", 4), ("llama", 16), ("delta", 16)], indirect=["built"])
def test_random_steps_give_the_tokens_of_one_process(
    built: tuple[World, Store], requests: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random requests of every kind, with preemption and changing adapters, get the answers of one process;
    compiled operations, which take blocks of 16, replay steps."""
    found: list[dict[str, list[StepOutput]]] = []
    states = read_config(built[0].base).state_bytes(4)
    sizes = {"adapter_memory_gb": 5e-5, "max_batch_seqs": 6} if states else {}
    for ranks in (1, 2):
        programs = Programs(monkeypatch)
        memory = (64 * 2 * 2 * 2 * 8 * 4 * max(1, block // 8) + 8 * states) / 1e9 / ranks
        ready = load(built, tensor_parallel=ranks, kv_memory_gb=memory, block_size=block, **sizes)
        with ExitStack() as stack:
            stack.callback(close, ready)
            found.append(take_random(ready, requests))
            assert ready.core.stats.preemptions
            assert ready.core.stats.prefix_tokens_hit
            assert ready.bank.residency.stats.evictions
            assert block < 16 or states or programs.runs
    assert found[0].keys() == found[1].keys()
    for name, outputs in found[0].items():
        for one, other in zip(outputs, found[1][name], strict=True):
            if one.pooled is not None:
                assert one.pooled == pytest.approx(other.pooled, abs=1e-3)
                continue
            assert one.token.id == other.token.id, name
            assert one.token.logprob == pytest.approx(other.token.logprob, abs=1e-4)
            assert [each.logprob for each in one.prompt[1:]] == pytest.approx(
                [each.logprob for each in other.prompt[1:]], abs=1e-3
            )


def take_random(ready: Replica, requests: int) -> dict[str, list[StepOutput]]:
    """Answer random requests, then one twice: which of the others share prefixes, the time of loads decides."""
    engine, draw, answers = ready.core, random.Random(3), defaultdict(list)
    for step in range(requests * 4):
        if step % 4 == 0:
            engine.add(request(ready, str(step), draw))
        take(ready, answers)
    for name in ("first", "second"):
        while not engine.idle:
            take(ready, answers)
        engine.add(sequence(ready, name, "base", [*range(3, 43)], SamplingParams(max_tokens=1)))
    while not engine.idle:
        take(ready, answers)
    return answers


def take(ready: Replica, answers: dict[str, list[StepOutput]]) -> None:
    """Run a step, behind what loads have posted."""
    ready.engine.inbox.receive(0.001)
    for output in ready.core.step():
        assert output.fault is None
        answers[output.seq_id].append(output)


@pytest.mark.parametrize("built", ["merged"], indirect=True)
def test_ranks_merge_their_parts(built: tuple[World, Store]) -> None:
    """A merged adapter, with magnitudes and biases of sums, answers as in one process."""
    found = []
    for ranks in (1, 2):
        ready = load(built, tensor_parallel=ranks, adapter_memory_gb=None)
        assert ready.service.local.catalog.get("all").adapter is None
        found.append(run_engine(ready, [("all", [5, 6, 7 + place]) for place in range(4)], 16))
        close(ready)
    assert found[0] == found[1]


@pytest.mark.parametrize(("built", "dtype"), [("llama", "bfloat16"), ("olmo2", "float32")], indirect=["built"])
def test_nothing_around_a_request_changes_a_bit(built: tuple[World, Store], dtype: str) -> None:
    """Alone, in a crowd, in chunks and after prefix hits, ranks give the same tokens and log probabilities."""
    draw, settings = random.Random(5), {"deterministic": True, "dtype": dtype, "adapter_memory_gb": None}
    requests = [(MODELS[at % 4], draw.choices(range(3, VOCAB), k=draw.randrange(1, 70))) for at in range(6)]
    quiet = load(built, **settings, max_batch_tokens=512, prefix_cache=False)
    alone = [with_logprobs(quiet, [each])[0] for each in requests]
    assert with_logprobs(quiet, requests) == alone
    close(quiet)
    chunked = load(built, **settings)
    for _ in range(2):
        assert with_logprobs(chunked, requests) == alone
    assert chunked.engine.stats.prefix_tokens_hit
    close(chunked)


def test_rounded_parts_are_as_close_to_the_base(built: tuple[World, Store]) -> None:
    """Ranks round the part of a row that each has by itself, and lose as much of answers as one process."""
    found, requests = [], [(name, [5, 6, 7 + place]) for place, name in enumerate(MODELS * 3)]
    for settings in (
        {"tensor_parallel": 1},
        {"tensor_parallel": 1, "quantization": "int8"},
        {"quantization": "int8"},
    ):
        ready = load(built, adapter_memory_gb=None, **settings)
        answers = next_logprobs(ready, requests)
        found.append(torch.tensor([[each[token] for token in range(VOCAB)] for each in answers]))
        close(ready)
    exact, one, ranks = found
    assert 0.8 < (ranks - exact).norm() / (one - exact).norm() < 1.2


async def test_adapters_come_leave_and_change_while_others_stream(built: tuple[World, Store]) -> None:
    """Streams through a bank of one adapter answer as one process does, while bundles fail or names move."""
    world, store = built
    requests = [(model, [5, 6, 7, 8, 9 + place]) for place, model in enumerate(MODELS[:4] * 2)]
    one = load(built, tensor_parallel=1, adapter_memory_gb=None)
    expected = run_engine(one, requests, 12)
    close(one)
    ready = load(built)
    service = Service(ready)
    ready.engine.start()
    ready.host.watch(ready.engine.fail)

    async def all_answers() -> list[list[int]]:
        fields = {"max_tokens": 12, "ignore_eos": True}
        answers = [service.answers(prompt, model=model, **fields) for model, prompt in requests]
        return [found for [found] in await result_of(asyncio.gather(*answers), "answers")]

    assert await all_answers() == expected
    generation = current_generation(store, "tiny")
    bundle = read_bundle(store, generation.adapters["rs"].digest)
    [key] = [key for key in store.list("") if bundle.digest in key and WEIGHTS_FILE in key]
    data = store.get(key)
    store.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    dropped: list[int] = []
    packer = RankedPacker(MagicMock(), MagicMock(ask=ready.host.ask, drop=dropped.append))
    with pytest.raises(BundleCorrupt, match=r"^rank 1 of 2: "):
        await asyncio.to_thread(packer, bundle)
    assert len(dropped) == 1
    store.put(key, data)
    streaming = asyncio.ensure_future(all_answers())
    turned = dict(zip(world.adapters, [*world.adapters][1:] + [*world.adapters][:1], strict=True))
    records = {name: generation.adapters[other] for name, other in turned.items()}
    ready.adapters.apply(generation.model_copy(update={"adapters": records, "number": 2}))
    await streaming
    now = {model: answers for (model, _), answers in zip(requests[:4], expected, strict=False)}
    prompts = dict(requests[:4])
    for model in world.adapters:
        [found] = await service.answers(prompts[turned[model]], model=model, max_tokens=12, ignore_eos=True)
        assert found == now[turned[model]]
    await service.close()
    close(ready)


@pytest.mark.parametrize(
    ("sent", "why"), [(signal.SIGKILL, "ended with signal 9"), (signal.SIGSTOP, "did not answer")]
)
async def test_a_rank_that_dies_or_hangs_ends_the_replica(
    built: tuple[World, Store], sent: signal.Signals, why: str
) -> None:
    """The running request and the engine end with the reason, and no process is left."""
    ready = load(built)
    ready.engine.start()
    ready.host.hung_s = 2.0
    ready.host.watch(ready.engine.fail)
    stream = ready.service.generate(Request.of("all", [5, 6, 7], max_tokens=200, ignore_eos=True))
    await anext(stream)
    os.kill(ready.host.pids[0], sent)

    async def rest() -> None:
        async for _ in stream:
            pass

    with pytest.raises(ReplicaFailed, match=f"rank 1 of 2 {why}"):
        await result_of(rest(), "the end of the stream")
    assert why in await result_of(ready.engine.stop(), "the end of the engine")
    await until(lambda: "engine" not in [each.name for each in threading.enumerate()], "the end of its thread")
    close(ready)


def test_a_rank_that_begins_late_is_waited_for() -> None:
    """A rank answers what was asked before it began, fails where that is too late, and ends with the engine."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = python(MODULE, *[f"{theirs.fileno()}"] * 3)
        left = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    assert left.wait(BOUND_S) == 1  # 0 once everything is imported
    late = RankHost(2)
    os.kill(late.pids[0], signal.SIGSTOP)
    answer = late.ask("load", {})
    os.kill(late.pids[0], signal.SIGCONT)
    with pytest.raises(InternalFault, match=r"^rank 1 of 2: "):  # there is nothing to load
        answer()
    late.close()
    never = RankHost(2, begin_s=0.2)
    os.kill(never.pids[0], signal.SIGSTOP)
    for _ in range(2):  # before the failure, and behind it
        with pytest.raises(ReplicaFailed, match="rank 1 of 2 did not begin"):
            never.ask("load", {})()
    never.close()


def test_what_ranks_cannot_compute_is_refused_at_the_start(built: tuple[World, Store]) -> None:
    """Heads, GPUs and adapters that ranks cannot divide are refused before any process is started."""
    with pytest.raises(SettingsInvalid, match="6 query heads, which it does not divide"):
        load(built, tensor_parallel=4)
    with pytest.raises(SettingsInvalid, match="needs as many GPUs, found 1"):
        RankHost(2, cards=1)
    model: Any = MagicMock(ranks=SimpleNamespace(shard=SimpleNamespace(world=2)))
    with pytest.raises(ProofFailed, match="2 tensor-parallel ranks cannot replay"):
        Packer(model, MagicMock(), MagicMock(), 16)(MagicMock())


def test_steps_that_all_ranks_record_answer_the_same(built: tuple[World, Store]) -> None:
    """Two ranks that replay tapes, where CUDA would replay graphs, give the tokens of one process."""
    requests = [(model, [5, 6, 7 + place]) for place, model in enumerate(MODELS[:3])]
    one = load(built, tensor_parallel=1, adapter_memory_gb=None, backend="triton")
    expected = run_engine(one, requests, 3)
    limits = SchedulerLimits(max_tokens=8, max_seqs=2, max_adapters=1, max_seq_len=16)
    recorder = CountingRecorder()
    with run_in_ranks(
        one, built[0].base, built[1], recorded=limits, backend="triton", recorder=recorder
    ) as two:
        assert run_engine(two, requests, 3) == expected
    assert recorder.replays
    close(one)
