"""``loramux import-bundle``, hostile npy files, and npy files that are pushed."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder_service.pipeline.context import BuildContext
from loramux.client import AsyncClient
from loramux_shared.bundle.manifest import CONFIG_FILE, WEIGHTS_FILE, bundle_key
from loramux_shared.rpc.calls import Patience
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.contract.builds.test_updates import World
from tests.contract.cli.test_cli_check import run
from tests.golden.hostile.exhibit import Exhibit, exhibit
from tests.golden.test_museum import judge
from tests.npy_files import write
from tests.support.adapters import HIDDEN, write_adapter, write_base
from tests.support.builders import HOUR, in_thread
from tests.support.fake_services import Fakes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base, and an adapter."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "fine", base_model_name_or_path="base")
    return tmp_path


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The flag that names a builder, which may read all that is made here."""
    folder = tmp_path_factory.mktemp("builder")
    context = BuildContext(MemoryStore(), open_sources(local_roots=[folder.parent]), folder / "work")
    with in_thread(context) as address:
        yield "--builder", address


def test_import_bundle_checks_and_says_how_to_publish(folder: Path, builder: tuple[str, str]) -> None:
    """An import without a deployment's name is a dry run."""
    write(folder / "npy", [(1, 0, 4), (18, 1, 2)])
    words = ("import-bundle", folder / "npy", "--base", folder / "base", "--name", "lora1")
    code, text, errors = run(*words, *builder)
    assert code == 0, errors
    assert "mlp_h_to_4h" in text
    assert "--deployment NAME publishes it" in errors


def test_import_bundle_wants_npy_files(folder: Path) -> None:
    """A folder without npy files, or with a PEFT adapter beside them, is refused by name."""
    code, _, errors = run("import-bundle", folder / "base", "--base", folder / "base", "--name", "a")
    assert (code, "expected model.lora_weights.npy" in errors) == (1, True)
    write(folder / "fine", [(1, 0, 4)])
    code, _, errors = run("import-bundle", folder / "fine", "--base", folder / "base", "--name", "a")
    assert (code, "adapter_config.json" in errors) == (1, True)


def test_import_bundle_publishes_a_deployment_of_one(folder: Path, fakes: Fakes) -> None:
    """An import with a deployment's name is a build of that one adapter."""
    write(folder / "npy", [(1, 0, 4)])
    code, text, errors = run(
        "import-bundle", folder / "npy", "--base", "org/base@main", "--name", "lora1",
        "--deployment", "imported", "--builder", fakes.builder_address,
    )  # fmt: skip
    assert code == 0, errors
    spec = fakes.builder.specs["imported"]
    assert [(each.name, each.repository.repo) for each in spec.adapters] == [("lora1", str(folder / "npy"))]
    assert (spec.base.repo, spec.base.revision) == ("org/base", "main")
    assert "deployment imported: generation 3 is published" in text


def _npy(columns: list[list[int]], width: int, *, wrong: bytes = b"") -> Any:
    def make(folder: Path) -> None:
        folder.mkdir()
        weights = np.ones((1, len(columns), width), np.float16)
        np.save(folder / "model.lora_weights.npy", weights)
        np.save(folder / "model.lora_config.npy", np.array([columns], np.int32))
        if wrong:
            (folder / "model.lora_weights.npy").write_bytes(wrong)

    return make


EXHIBITS = (
    exhibit("npy of another base", "E_DIMS", _npy([[1, 0, 4, 0]], 4 * HIDDEN)),
    exhibit("npy that is cut off", "E_BAD_NPY", _npy([[1, 0, 4, 0]], 8 * HIDDEN, wrong=b"\x93NUMPY\x01\x00")),
    exhibit("npy that is a pickle", "E_BAD_NPY", _npy([[1, 0, 4, 0]], 8, wrong=pickle.dumps([1]))),
    exhibit("npy with both halves", "W_GATE_UP W_BASE", _npy([[18, 0, 4, 0]], 4 * (HIDDEN + 2 * 24))),
)


@pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: exhibit.name.replace(" ", "-"))
def test_every_exhibit_gets_its_codes_and_no_others(tmp_path: Path, exhibit: Exhibit) -> None:
    """Hostile, broken or odd files are refused or warned about by name, in few words."""
    findings, store = judge(exhibit, tmp_path)
    assert sorted(finding.code for finding in findings) == sorted(exhibit.codes)
    assert bool(store.objects) != exhibit.refused


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A builder with a deployment of one adapter."""
    made = World(tmp_path)
    patience = Patience(send_s=1e9, pause_s=HOUR)
    async with made.served(made.builder(), patience) as address, AsyncClient(builder=address) as made.client:
        await made.build(made.deployment("one"))
        yield made


async def test_npy_files_are_pushed_as_a_build_takes_them(world: World) -> None:
    """An adapter's own bundle, sent as files of a converter, is the adapter that a build makes of them."""
    npy, one = world.folder / "npy", world.generation.adapters["one"]
    npy.mkdir()
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        (npy / name).write_bytes(world.store.get(bundle_key(one.digest, name)))
    imported = await world.client.push("tiny", "npy", npy)
    await world.update("npy")
    assert world.generation.adapters["npy"].digest == imported.digest
    assert imported.adapter.kinds == ("lora",)
