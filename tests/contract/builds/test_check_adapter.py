"""CheckAdapter over gRPC: the whole report, and nothing written."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from builder_service.pipeline import check
from builder_service.pipeline.context import BuildContext
from loramux.client import AsyncClient
from loramux.faults import (
    CheckpointInvalid,
    DeploymentInvalid,
    RepoNotFound,
    ShuttingDown,
    SourceRefused,
    SourceUnavailable,
)
from loramux.records import AdapterReport
from loramux_shared.access.keys import ACCESS, Access, Scope
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.deployment import Dtype, LoraConfiguration, SourceKind
from loramux_shared.sources.base import Progress, Resolved, unwatched
from loramux_shared.sources.local import LocalSource
from loramux_shared.sources.open import Sources
from tests.support.adapters import HIDDEN, tensors, write_adapter
from tests.support.builders import OWNER, Builders
from tests.support.waiting import Clock, result_of, until, wait_until


class SlowSource(LocalSource):
    """Folders; some begin to come, and go on when the test says so."""

    def __init__(self, folder: Path) -> None:
        super().__init__([folder])
        self.slow: set[str] = set()
        """Names of the folders that take their time."""
        self.begun = Counter[str]()
        self.go = threading.Event()
        self._lock = threading.Lock()

    def fetch(
        self, resolved: Resolved, names: Iterable[str], into: Path, progress: Progress = unwatched
    ) -> dict[str, FileDigest]:
        """Report progress without bytes until the test lets the files come."""
        if (name := Path(resolved.repository.repo).name) in self.slow:
            into.mkdir(parents=True, exist_ok=True)
            with self._lock:
                self.begun[name] += 1
            wait_until(lambda: progress(0) or self.go.is_set(), "files that come")
        return super().fetch(resolved, names, into, progress)


class Served(Builders):
    """A served builder over a store that stays empty."""

    client: AsyncClient

    def __init__(self, folder: Path) -> None:
        self.source = SlowSource(folder)
        super().__init__(folder)

    def context(self, owner: str = OWNER) -> BuildContext:
        return replace(super().context(owner), sources=Sources({SourceKind.LOCAL: self.source}))

    async def begin_slow(self, adapter: str, count: int = 1) -> list[asyncio.Task[AdapterReport]]:
        """Begin checks of an adapter whose files do not come yet."""
        self.source.slow.add(adapter)
        checks = [asyncio.create_task(self.check(adapter)) for _ in range(count)]
        await until(lambda: self.source.begun[adapter] == count, "checks that wait for their source")
        return checks

    async def check(self, adapter: str, *required: LoraConfiguration, **more: object) -> AdapterReport:
        return await self.client.check(str(self.folder / adapter), str(self.folder / "base"), *required, **more)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Served]:
    """A builder, a base and adapters."""
    made = Served(tmp_path)
    async with made.served(made.builder()) as address, AsyncClient(builder=address) as made.client:
        yield made


async def test_the_report_of_an_adapter_that_would_be_built(world: Served) -> None:
    """Rows with ranks, scales and norms, files with digests, resolved revisions; the store is untouched."""
    values = tensors(("q_proj",), rank=4) | tensors(("down_proj",), rank=2)
    write_adapter(world.folder / "two", values, r=4, rank_pattern={"down_proj": 2}, use_rslora=True)
    (world.folder / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    report = await world.check("two")
    assert report.accepted
    assert [(row.layer, row.module, row.rank) for row in report.rows] == [
        (0, "attn_q", 4), (0, "mlp_4h_to_h", 2), (1, "attn_q", 4), (1, "mlp_4h_to_h", 2),
    ]  # fmt: skip
    assert [round(row.scale, 4) for row in report.rows[:2]] == [4.0, 5.6569]
    a, b = (np.asarray(value, np.float64) for value in list(values.values())[:2])
    assert report.rows[0].norm_a == pytest.approx(np.linalg.norm(a), rel=1e-3)
    assert report.rows[0].norm_ba == pytest.approx(np.linalg.norm(4 * b @ a), rel=2e-2)
    assert {name: file.size for name, file in report.files.items()} == {
        path.name: path.stat().st_size for path in (world.folder / "two").iterdir()
    }
    assert len(report.adapter.revision) == len(report.base.revision) == 64
    assert (report.dtype, report.base_model_name) == (Dtype.BFLOAT16, "org/tiny")
    assert (report.licence, report.base_licence) == ("", "mit")
    assert {"W_BASE", "W_LICENSE"} <= {finding.code for finding in report.findings}
    assert world.store.objects == {}
    assert list((world.folder / "work").iterdir()) == []


async def test_a_report_names_labels(world: Served) -> None:
    """Labels come from a config beside a classifier, else from transformers' defaults; a wrong one is named."""
    head = {"base_model.model.score.weight": np.ones((2, HIDDEN), "f4")}
    saved = ["classifier", "score"] * 40  # which PEFT adds each time that a config is used
    trained = {"task_type": "SEQ_CLS", "modules_to_save": saved}
    for name in ("named", "nameless"):
        write_adapter(world.folder / name, tensors() | head, **trained)
    about = {"id2label": {"0": "spam", "1": "ham"}, "problem_type": "multi_label_classification"}
    (world.folder / "named" / "config.json").write_text(json.dumps(about))
    named = await world.check("named")
    nameless = await world.check("nameless")
    assert (named.labels, named.problem_type) == (("spam", "ham"), "multi_label_classification")
    assert (nameless.labels, nameless.problem_type) == (("LABEL_0", "LABEL_1"), "")
    assert named.kinds == nameless.kinds == ("lora", "classifier")
    for wrong in ('{"id2label": {"0": "a"}}', '{"problem_type": "guessing"}', "["):
        (world.folder / "named" / "config.json").write_text(wrong)
        assert [each.code for each in (await world.check("named")).findings][:1] == ["E_BAD_TEXT"], wrong


async def test_the_ceilings_of_a_deployment_can_be_asked_for(world: Served) -> None:
    """Rank, modules, storage type, truncation and signers are those of the request."""
    signers = ["sigstore:https://issuer.example.com#release@example.com"]
    lora = LoraConfiguration(max_lora_rank=2, lora_target_modules=("attn_q",), dtype=Dtype.FLOAT16)
    strict = await world.check("one", lora)
    cut = await world.check("one", LoraConfiguration(truncate_to_rank=2))
    unsigned = await world.check("one", signed_by=signers)
    assert {finding.code for finding in strict.findings} >= {"E_RANK_MAX", "E_MODULE"}
    assert strict.dtype is Dtype.FLOAT16
    assert [finding.code for finding in unsigned.findings] == ["E_SIGNATURE"]
    assert cut.accepted
    assert {(row.rank, row.truncated_from) for row in cut.rows} == {(2, 4)}
    assert all(0 < row.truncation_error < 1 for row in cut.rows)


async def test_faults_are_named_without_the_checks_own_words(world: Served) -> None:
    """A fault of a source or of the base arrives as it does from a build."""
    base = str(world.folder / "base")
    (world.folder / "empty").mkdir()
    with pytest.raises(RepoNotFound, match=r"^LOCAL") as missing:
        await world.check("nowhere")
    assert missing.value.repository == str(world.folder / "nowhere")
    with pytest.raises(SourceRefused):
        await world.client.check("/etc", base)
    with pytest.raises(CheckpointInvalid) as unreadable:
        await world.client.check(str(world.folder / "one"), str(world.folder / "empty"))
    assert unreadable.value.repository == str(world.folder / "empty")
    with pytest.raises(DeploymentInvalid) as error:
        await world.client.check(
            str(world.folder / "one"), base, LoraConfiguration(max_lora_rank=2, truncate_to_rank=3)
        )
    assert error.value.findings[0].where == "build.lora_configuration.truncate_to_rank"
    report = await world.check("empty")
    assert [finding.code for finding in report.findings] == ["E_NO_CONFIG"]


async def test_a_check_that_nobody_waits_for_is_stopped(world: Served) -> None:
    """A cancelled call stops its work and removes the folder."""
    [call] = await world.begin_slow("one")
    work = world.folder / "work"
    assert list(work.iterdir()) != []
    call.cancel()
    await until(lambda: not list(work.iterdir()), "the end of the check", lambda: [*work.rglob("*")])


async def test_slow_sources_hold_no_place(world: Served) -> None:
    """Checks that wait for their sources do not keep another one from being made."""
    waiting = await world.begin_slow("two", 5)
    try:
        assert (await result_of(world.check("one"), "the check between slow ones")).accepted
    finally:
        world.source.go.set()
    assert all(report.accepted for report in await asyncio.gather(*waiting))


async def test_checks_of_a_busy_key_leave_a_place_to_another(tmp_path: Path) -> None:
    """Checks of one key wait for their source in all places but one; the check of another key begins."""
    builders = Served(tmp_path)
    builders.source.slow |= {"one", "two"}
    begun = builders.source.begun

    async def check_as(key_id: str, adapter: str) -> None:
        ACCESS.set(Access(key_id, frozenset({Scope.BUILD})))
        await builders.checks.check(builders.deployment(adapter))

    calls = [asyncio.create_task(check_as("busy", "one")) for _ in range(check.MAX_OPEN_CHECKS)]
    try:
        await until(lambda: begun["one"] == check.MAX_OPEN_CHECKS - 1, "the busy key's share")
        calls.append(asyncio.create_task(check_as("other", "two")))
        await until(lambda: begun["two"], "the other key's check")
        assert begun["one"] == check.MAX_OPEN_CHECKS - 1
    finally:
        builders.source.go.set()
    await asyncio.gather(*calls)
    assert begun["one"] == check.MAX_OPEN_CHECKS


async def test_a_check_ends_in_time(world: Served) -> None:
    """A source that sends bytes slowly, without an end, is SOURCE_UNAVAILABLE; its files are gone."""
    clock = Clock()
    [call] = await world.begin_slow("one")
    clock.advance(check.MAX_CHECK_S)
    with pytest.raises(SourceUnavailable, match="the check took longer than 600 s"):
        await result_of(call, "the check")
    assert list((world.folder / "work").iterdir()) == []


async def test_a_builder_that_stops_refuses_new_calls(world: Served) -> None:
    """The answer says to retry with its successor."""
    world.checks.stop()
    with pytest.raises(ShuttingDown):
        await world.check("one")
