"""CheckAdapter over gRPC: the whole report, and nothing written."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from builder_service.builds.builds import Builds
from builder_service.builds.limits import BuildLimits
from builder_service.pipeline.check import Checks
from builder_service.pipeline.context import BuildContext
from builder_service.rpc.servicer import SERVICE_NAME, BuilderServicer
from loramux.client import AsyncClient, Client
from loramux.faults import (
    CallFailed,
    CheckpointInvalid,
    DeploymentInvalid,
    RepoNotFound,
    ShuttingDown,
    SourceRefused,
)
from loramux_shared.deployment import Dtype, LoraConfiguration
from loramux_shared.rpc.server import RpcServer
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.contract.builds.test_builder_service import Running as Building
from tests.support.adapters import HIDDEN, key, tensors, write_adapter, write_base


class Running:
    """A served builder over a store that stays empty."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = MemoryStore()
        self.context = BuildContext(self.store, open_sources(local_roots=[folder]), folder / "work")
        self.checks = Checks(self.context)
        self.address = ""


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    """A builder, a base and an adapter."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "one")
    made = Running(tmp_path)
    builds = Builds(made.context, BuildLimits(running=1))
    server = RpcServer("127.0.0.1:0", {SERVICE_NAME: BuilderServicer(builds, made.checks).register})
    made.address = await server.start()
    yield made
    made.checks.stop()
    await builds.drain(1)
    await server.drain(1)


async def test_the_report_of_an_adapter_that_would_be_built(running: Running) -> None:
    """Rows with ranks, scales and norms, files with digests, resolved revisions; the store is untouched."""
    values = tensors(("q_proj",), rank=4) | tensors(("down_proj",), rank=2)
    write_adapter(running.folder / "two", values, r=4, rank_pattern={"down_proj": 2}, use_rslora=True)
    (running.folder / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    async with AsyncClient(builder=running.address) as client:
        report = await client.check(str(running.folder / "two"), str(running.folder / "base"))
    assert report.accepted
    assert [(row.layer, row.module, row.rank) for row in report.rows] == [
        (0, "attn_q", 4), (0, "mlp_4h_to_h", 2), (1, "attn_q", 4), (1, "mlp_4h_to_h", 2),
    ]  # fmt: skip
    assert [round(row.scale, 4) for row in report.rows[:2]] == [4.0, 5.6569]
    a, b = (np.asarray(value, np.float64) for value in list(values.values())[:2])
    assert report.rows[0].norm_a == pytest.approx(np.linalg.norm(a), rel=1e-3)
    assert report.rows[0].norm_ba == pytest.approx(np.linalg.norm(4 * b @ a), rel=2e-2)
    assert {name: file.size for name, file in report.files.items()} == {
        path.name: path.stat().st_size for path in (running.folder / "two").iterdir()
    }
    assert len(report.adapter.revision) == len(report.base.revision) == 64
    assert (report.dtype, report.base_model_name) == (Dtype.BFLOAT16, "org/tiny")
    assert (report.licence, report.base_licence) == ("", "mit")
    assert {"W_BASE", "W_LICENSE"} <= {finding.code for finding in report.findings}
    assert list(running.store.list("")) == []
    assert list((running.folder / "work").iterdir()) == []


async def test_a_report_says_which_kind_an_adapter_is(running: Running) -> None:
    """Scales of outputs have rows with a vector and no rank; tokens of an invocation are told."""
    scales = {f"{key(0, 'k_proj', 'A').partition('.lora')[0]}.ia3_l": np.full((HIDDEN // 2, 1), 1.5, "f4")}
    ia3 = {"peft_type": "IA3", "feedforward_modules": [], "target_modules": ["k_proj"]}
    of_lora = dict.fromkeys(("r", "lora_alpha", "bias", "init_lora_weights"))
    write_adapter(running.folder / "ia3", scales, **ia3, **of_lora)
    write_adapter(running.folder / "called", alora_invocation_tokens=[3, 4])
    async with AsyncClient(builder=running.address) as client:
        base = str(running.folder / "base")
        found = await client.check(str(running.folder / "ia3"), base)
        called = await client.check(str(running.folder / "called"), base)
    assert (found.accepted, found.kinds) == (True, ("ia3",))
    assert [(row.module, row.rank, row.vectors) for row in found.rows] == [("attn_k", 0, 1)]
    assert (called.kinds, called.invocation_tokens) == (("lora", "activated"), (3, 4))


async def test_a_report_names_labels(running: Running) -> None:
    """As a config beside a classifier calls them, or as transformers does where there is none."""
    head = {"base_model.model.score.weight": np.ones((2, HIDDEN), "f4")}
    trained = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    for name in ("named", "nameless"):
        write_adapter(running.folder / name, tensors() | head, **trained)
    about = {"id2label": {"0": "spam", "1": "ham"}, "problem_type": "multi_label_classification"}
    (running.folder / "named" / "config.json").write_text(json.dumps(about))
    async with AsyncClient(builder=running.address) as client:
        base = str(running.folder / "base")
        named = await client.check(str(running.folder / "named"), base)
        nameless = await client.check(str(running.folder / "nameless"), base)
    assert (named.labels, named.problem_type) == (("spam", "ham"), "multi_label_classification")
    assert (nameless.labels, nameless.problem_type) == (("LABEL_0", "LABEL_1"), "")
    assert named.kinds == nameless.kinds == ("lora", "classifier")


async def test_the_size_of_the_bundle_is_told_beforehand(running: Running) -> None:
    """bundle_bytes is what a build then writes."""
    async with AsyncClient(builder=running.address) as client:
        report = await client.check(str(running.folder / "one"), str(running.folder / "base"))
    building = Building(running.folder)
    await building.builds.build(building.deployment("one"))
    views = [view async for view in building.builds.watch("tiny")]
    await building.builds.drain(1)
    assert views[-1].adapters[0].bundle_bytes == report.bundle_bytes > 0


async def test_a_refused_adapter_is_an_answer_with_every_violation(running: Running) -> None:
    """Errors come first, warnings behind them; no rows, no bundle, no fault."""
    values = tensors(("q_proj", "v_proj"), rank=80)
    values["base_model.model.model.layers.9.mlp.nothing.lora_A.weight"] = np.zeros((1, 1), np.float32)
    write_adapter(running.folder / "bad", values, r=80, use_dora=True)
    (running.folder / "bad" / "optimizer.pt").write_bytes(b"x")
    async with AsyncClient(builder=running.address) as client:
        report = await client.check(str(running.folder / "bad"), str(running.folder / "base"))
    codes = [finding.code for finding in report.findings]
    assert not report.accepted
    assert {"E_RANK_MAX", "E_DORA", "E_MODULE"} <= set(codes)
    assert codes == sorted(codes, key=lambda code: code.startswith("W_"))
    assert "W_EXTRA_FILES" in codes
    assert (report.rows, report.bundle_bytes) == ((), 0)
    assert {finding.adapter for finding in report.findings} == {""}


async def test_the_ceilings_of_a_deployment_can_be_asked_for(running: Running) -> None:
    """Rank, modules, storage type, truncation and signers are those of the request."""
    signers = ["sigstore:https://issuer.example.com#release@example.com"]
    lora = LoraConfiguration(max_lora_rank=2, lora_target_modules=("attn_q",), dtype=Dtype.FLOAT16)
    adapter, base = str(running.folder / "one"), str(running.folder / "base")
    async with AsyncClient(builder=running.address) as client:
        strict = await client.check(adapter, base, lora)
        cut = await client.check(adapter, base, LoraConfiguration(truncate_to_rank=2))
        unsigned = await client.check(adapter, base, signed_by=signers)
    assert {finding.code for finding in strict.findings} >= {"E_RANK_MAX", "E_MODULE"}
    assert strict.dtype is Dtype.FLOAT16
    assert [finding.code for finding in unsigned.findings] == ["E_SIGNATURE"]
    assert cut.accepted
    assert {(row.rank, row.truncated_from) for row in cut.rows} == {(2, 4)}
    assert all(0 < row.truncation_error < 1 for row in cut.rows)


async def test_faults_are_named_without_the_checks_own_words(running: Running) -> None:
    """What a source or the base says arrives as it does from a build."""
    base = str(running.folder / "base")
    (running.folder / "empty").mkdir()
    async with AsyncClient(builder=running.address) as client:
        with pytest.raises(RepoNotFound, match=r"^LOCAL") as missing:
            await client.check(str(running.folder / "nowhere"), base)
        assert missing.value.repository == str(running.folder / "nowhere")
        with pytest.raises(SourceRefused):
            await client.check("/etc", base)
        with pytest.raises(CheckpointInvalid) as unreadable:
            await client.check(str(running.folder / "one"), str(running.folder / "empty"))
        assert unreadable.value.repository == str(running.folder / "empty")
        with pytest.raises(DeploymentInvalid) as invalid:
            await client.check("not a repository", base)
        assert invalid.value.repository == ""
        with pytest.raises(DeploymentInvalid) as error:
            await client.check(
                str(running.folder / "one"), base, LoraConfiguration(max_lora_rank=2, truncate_to_rank=3)
            )
        assert error.value.findings[0].where == "build.lora_configuration.truncate_to_rank"
        report = await client.check(str(running.folder / "empty"), base)
    assert [finding.code for finding in report.findings] == ["E_NO_CONFIG"]


def test_the_client_for_threads_has_it_too(running_in_thread: str, tmp_path: Path) -> None:
    """Client.check is AsyncClient.check."""
    with Client(builder=running_in_thread) as client:
        assert client.check(str(tmp_path / "one"), str(tmp_path / "base")).accepted


@pytest.fixture
def running_in_thread(tmp_path: Path) -> AsyncIterator[str]:
    """The same, served from a thread of its own."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "one")
    loop, up, address = asyncio.new_event_loop(), threading.Event(), []
    stop = asyncio.Event()

    async def serve() -> None:
        made = Running(tmp_path)
        builds = Builds(made.context, BuildLimits(running=1))
        server = RpcServer("127.0.0.1:0", {SERVICE_NAME: BuilderServicer(builds, made.checks).register})
        address.append(await server.start())
        up.set()
        await stop.wait()
        made.checks.stop()
        await builds.drain(1)
        await server.drain(1)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert up.wait(10)
    yield address[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)


async def test_a_deadline_stops_the_work(running: Running) -> None:
    """A call that nobody waits for any more is stopped at its next bytes, and its folder goes away."""
    values = {name: np.zeros((2000, 2000), np.float32) for name in list(tensors())}
    write_adapter(running.folder / "large", values)
    async with AsyncClient(builder=running.address) as client:
        with pytest.raises(CallFailed, match="DEADLINE"):
            await client.check(str(running.folder / "large"), str(running.folder / "base"), timeout_s=0.05)
    for _ in range(100):
        if not list((running.folder / "work").iterdir()):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(json.dumps([str(path) for path in (running.folder / "work").rglob("*")]))


async def test_a_builder_that_stops_takes_no_more(running: Running) -> None:
    """The answer says to retry with its successor."""
    running.checks.stop()
    async with AsyncClient(builder=running.address) as client:
        with pytest.raises(ShuttingDown):
            await client.check(str(running.folder / "one"), str(running.folder / "base"))
