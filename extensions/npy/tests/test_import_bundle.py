"""npy files: imported by ``loramux import-bundle``, and mutated ones refused by name."""

import json
import pickle
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from builder_service.domain.rules.adapter import CheckedAdapter, Rulebook, check_tensors
from builder_service.pipeline.context import BuildContext
from loramux.client import AsyncClient
from loramux_npy.reading import FOLDED, NpyAdapter, read_npy_adapter
from loramux_shared.bundle.manifest import CONFIG_FILE, WEIGHTS_FILE, bundle_key
from loramux_shared.codes import CODES
from loramux_shared.rpc.calls import Patience
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.contract.builds.test_updates import World
from tests.contract.cli.test_cli_check import run
from tests.fuzz.mutate import NUMBERS, bounded, mutations
from tests.golden.hostile.exhibit import Exhibit, exhibit
from tests.golden.test_museum import judge
from tests.npy_files import SIZES, matrices, write
from tests.support.adapters import HIDDEN, write_adapter, write_base
from tests.support.builders import HOUR, in_thread
from tests.support.fake_services import Fakes
from tests.unit.domain.test_adapter_rules import book


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


WEIGHTS, CONFIG = "model.lora_weights.npy", "model.lora_config.npy"
ROWS = ((0, 0, 2), (1, 1, 4), (5, 1, 3), (18, 0, 2))


def written(folder: Path, rng: Random) -> None:
    """Write both files: as a converter does, or with numbers of the table or of the headers changed."""
    rows = rng.sample(ROWS, rng.randint(1, len(ROWS)))
    flat = [np.concatenate([part.ravel() for part in matrices(*row)]) for row in rows]
    width = max(map(len, flat)) + rng.choice((0, 3, sum(SIZES[1])))
    weights = np.stack([np.pad(row, (0, width - len(row))) for row in flat])
    table = np.array([[*row, 0] for row in rows], np.int64)
    if rng.random() < 0.5:
        at = rng.randrange(len(rows)), rng.randrange(4)
        table[at] = rng.choice((-1, 0, 1, 2, 3, 5, 9, 13, 77, 2**31 - 1, -(2**31)))
    np.save(folder / WEIGHTS, weights.astype(rng.choice(("<f2", "<f4"))))
    np.save(folder / CONFIG, table.astype(np.int32))
    if rng.random() < 0.7:
        path = folder / rng.choice((WEIGHTS, CONFIG))
        data = path.read_bytes()
        path.write_bytes(_renumbered(data, rng) if rng.random() < 0.3 else mutations(data, rng))


def _renumbered(data: bytes, rng: Random) -> bytes:
    """Return a file whose header has another shape, of the same length where that is possible."""
    begin = data.index(b"'shape': (") + len("'shape': (")
    end = data.index(b")", begin)
    sizes = [str(rng.choice((*NUMBERS, 1, 2, 4))) for _ in range(rng.choice((1, 2, 2, 3)))]
    text = ", ".join(sizes).encode()
    room = end - begin + 8
    return (
        data[:begin] + text + data[end : end + 4] + data[end + 4 + max(0, min(len(text), room) - end + begin) :]
    )


def checked(folder: Path, rules: Rulebook) -> tuple[NpyAdapter, CheckedAdapter | None]:
    """Read a folder, and check the result."""
    npy = read_npy_adapter(folder, rules.limits.base)
    if npy.file is None:
        return npy, None
    return npy, check_tensors(npy.file, FOLDED, rules, list(npy.findings), lambda _: None)


def same_numbers(folder: Path, npy: NpyAdapter) -> bool:
    """True when every tensor is where numpy sees it."""
    weights: Any = np.load(folder / WEIGHTS, allow_pickle=False)
    raw = weights.reshape(-1, weights.shape[-1]).view(np.uint8)
    start = (folder / WEIGHTS).stat().st_size - raw.size
    flat = raw.reshape(-1)
    for tensor in npy.file.tensors.values():
        begin = tensor.offset - start
        if npy.file.read(tensor.name).tobytes() != flat[begin : begin + tensor.size].tobytes():
            return False
    return True


RUNS = [
    pytest.param(range(100), id="short"),
    pytest.param(range(10_000, 30_000), marks=(pytest.mark.sweep, pytest.mark.timeout(3600)), id="long"),
]


def fuzz(folder: Path, cases: range) -> None:
    """Check so many mutations, each from a seed of its own."""
    rules = book()
    with bounded() as watch:
        for case in cases:
            written(folder, Random(case))
            with watch.case(f"seed {case}"):
                npy, whole = checked(folder, rules)
            findings = npy.findings if whole is None else whole.findings
            assert {finding.code for finding in findings} <= CODES.keys(), case
            assert max((len(str(finding)) for finding in findings), default=0) < 2000, case
            json.dumps([finding.model_dump() for finding in findings], ensure_ascii=False).encode()
            refused = any(finding.code.startswith("E_") for finding in findings)
            assert refused == (whole is None or not whole.rows), case
            watch.note("refused" if refused else "accepted")
            if not refused:
                assert same_numbers(folder, npy), case


@pytest.mark.parametrize("cases", RUNS)
def test_mutated_files_are_taken_or_refused_by_name(tmp_path: Path, cases: range) -> None:
    """A file that is accepted has the numbers that numpy reads; one that is refused has a code."""
    fuzz(tmp_path, cases)
