"""npy files of another TensorRT-LLM converter: the rules of any adapter, exact rows, the command, mutations."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from builder_service.domain.rules.tensor_passes import TensorCheck, check_tensors
from builder_service.pipeline.check import CheckedReport, check_one
from builder_service.pipeline.npy_files import FOLDED, NpyAdapter, read_npy_adapter
from builder_service.pipeline.progress import Progress
from loramux_shared.bundle.reader import Bundle
from tests.contract.cli.test_cli_check import folder as folder, shared as shared
from tests.fuzz.mutate import NUMBERS, bounded, check_findings, mutations, runs
from tests.support.adapters import HIDDEN, INTERMEDIATE, write_adapter, write_base
from tests.support.folders import context_of, deployment_of, run_build
from tests.support.processes.commands import run
from tests.support.services.fake_grpc import Fakes
from tests.unit.domain.test_adapter_rules import book

Q, KV = HIDDEN, HIDDEN // 2
SIZES = {
    0: (HIDDEN, Q + 2 * KV),
    1: (HIDDEN, Q),
    2: (HIDDEN, KV),
    3: (HIDDEN, KV),
    4: (Q, HIDDEN),
    5: (HIDDEN, INTERMEDIATE),
    6: (INTERMEDIATE, HIDDEN),
    7: (HIDDEN, INTERMEDIATE),
    18: (HIDDEN, 2 * INTERMEDIATE),
}
Rows = list[tuple[int, int, int]]
"""(module id, layer, rank)"""
BF16 = np.dtype(ml_dtypes.bfloat16)


def matrices(module: int, layer: int, rank: int) -> tuple[Any, Any]:
    """A and B of a row, exact in every storage type."""
    random = np.random.default_rng([module, layer, rank])
    features, out = SIZES[module]
    a = random.integers(-64, 64, (rank, features)) / 32
    return a.astype(np.float32), (random.integers(1, 64, (out, rank)) / 32).astype(np.float32)


def write(
    folder: Path,
    rows: Rows,
    *,
    dtype: Any = np.float16,
    columns: int = 4,
    batch: bool = True,
    config_name: str = "model.lora_config.npy",
    extra: int = 3,
    change: Callable[[Any, Any], None] | None = None,
) -> Path:
    """Write the files of a converter: rows in their order, padded a little more than they must be."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = [np.concatenate([part.ravel() for part in matrices(*row)]) for row in rows]
    width = max(map(len, flat)) + extra
    weights = np.stack([np.pad(row, (0, width - len(row))) for row in flat])
    config = np.array([[*row, 0][:columns] for row in rows], np.int32)
    if change is not None:
        change(weights, config)
    stored = weights.astype(dtype)
    np.save(folder / "model.lora_weights.npy", stored[None] if batch else stored)
    np.save(folder / config_name, config[None] if batch else config)
    return folder


class Bench:
    """A base, a folder for npy files, a store."""

    def __init__(self, root: Path) -> None:
        self.root, self.npy = root, root / "npy"
        write_base(root / "base")
        self.context = context_of(root)

    def check(self, **lora: Any) -> CheckedReport:
        required = deployment_of(self.root, "npy", lora_configuration=lora)
        return check_one(required, self.context, Progress(["npy"]))

    def build(self, **lora: Any) -> Bundle:
        return run_build(deployment_of(self.root, "npy", lora_configuration=lora), self.context).bundle("npy")

    def errors(self, **lora: Any) -> list[tuple[str, str]]:
        """Codes and places of the errors of a check."""
        return [(item.code, item.where) for item in self.check(**lora).findings if item.code[:2] == "E_"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


EVERY: Rows = [(6, 1, 3), (1, 0, 4), (3, 0, 2), (2, 1, 4), (4, 1, 1), (7, 0, 8), (5, 0, 8)]


@pytest.mark.parametrize(
    ("dtype", "columns", "batch"),
    [(np.float16, 3, True), (np.float32, 4, False), (BF16, 4, True), ("V2", 3, False), ("V2", 4, True)],
)
def test_files_of_every_kind_become_the_same_rows(bench: Bench, dtype: Any, columns: int, batch: bool) -> None:
    """Any type, three or four columns, with or without the batch dimension: sorted rows of the same values."""
    raw = dtype == "V2"
    write(bench.npy, EVERY, dtype=BF16 if raw else dtype, columns=columns, batch=batch)
    if raw:  # as TensorRT-LLM saves bfloat16
        values = np.load(bench.npy / "model.lora_weights.npy")
        np.save(bench.npy / "model.lora_weights.npy", values.view("V2"))
    bundle = bench.build(dtype="float32")
    assert [(row.row.module_id, row.row.layer, row.row.rank) for row in bundle.rows] == sorted(
        EVERY, key=lambda row: (row[1], row[0])
    )
    for row in bundle.rows:
        a, b = matrices(row.row.module_id, row.row.layer, row.row.rank)
        np.testing.assert_array_equal(row.a, a)
        np.testing.assert_array_equal(row.b, b)
    assert {row.row.scale for row in bundle.rows} == {1.0}
    assert sorted(bundle.manifest.inputs) == ["model.lora_config.npy", "model.lora_weights.npy"]


def test_the_older_name_of_the_config_is_known(bench: Bench) -> None:
    """``model.lora_keys.npy`` is the config's name of older converters."""
    write(bench.npy, EVERY, config_name="model.lora_keys.npy")
    assert bench.check().accepted
    assert "model.lora_keys.npy" in bench.build().manifest.inputs


def test_fused_rows_are_split_exactly(bench: Bench) -> None:
    """attn_qkv is [q; k; v] and mlp_gate_up is [up; gate]: A is shared, and B's rows go where they belong."""
    write(bench.npy, [(0, 0, 4), (18, 1, 2)])
    bundle = bench.build(dtype="float32")
    a, b = matrices(0, 0, 4)
    assert [(row.row.layer, row.row.module) for row in bundle.rows] == [
        (0, "attn_q"), (0, "attn_k"), (0, "attn_v"), (1, "mlp_h_to_4h"), (1, "mlp_gate"),
    ]  # fmt: skip
    for row, part in zip(bundle.rows[:3], (b[:Q], b[Q : Q + KV], b[Q + KV :]), strict=True):
        np.testing.assert_array_equal(row.a, a)
        np.testing.assert_array_equal(row.b, part)
    a, b = matrices(18, 1, 2)
    gate, up = bundle.rows[3:]
    np.testing.assert_array_equal(gate.b, b[INTERMEDIATE:])
    np.testing.assert_array_equal(up.b, b[:INTERMEDIATE])
    assert "W_GATE_UP" in [finding.code for finding in bundle.manifest.warnings]


def test_a_peft_adapter_and_its_conversion_are_the_same_rows(bench: Bench) -> None:
    """Rows from PEFT and from our own npy files differ in nothing but their origin."""
    write_adapter(bench.npy)
    first = bench.build()
    store, digest = bench.context.store, first.digest
    for path in bench.npy.iterdir():
        path.unlink()
    for name in ("model.lora_weights.npy", "model.lora_config.npy"):
        (bench.npy / name).write_bytes(store.get(f"bundles/sha256/{digest}/{name}"))
    again = bench.build()
    assert again.manifest.files == first.manifest.files


def poke(row: int, column: int, value: float, *, weights: bool = False) -> Callable[[Any, Any], None]:
    """Change one number of the config, or of the weights."""

    def change(values: Any, config: Any) -> None:
        (values if weights else config)[row, column] = value

    return change


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (poke(0, 0, 9), "E_MODULE"),
        (poke(0, 0, 77), "E_MODULE"),
        (poke(0, 0, 13), "E_MOE"),
        (poke(0, 1, 2), "E_LAYER"),
        (poke(0, 1, -1), "E_BAD_NPY"),
        (poke(0, 2, 0), "E_BAD_NPY"),
        (poke(0, 2, 3), "E_DIMS"),
        (poke(0, 2, 5), "E_DIMS"),
        (poke(0, 3, 1), "E_DIMS"),
        (poke(0, 3, 2), "E_BAD_NPY"),
        (poke(1, 0, 1), "E_PAIR"),
        (poke(0, 4, float("nan"), weights=True), "E_NAN"),
        (poke(1, -1, 0.5, weights=True), "E_DIMS"),
    ],
)
def test_rows_that_do_not_fit_are_refused(bench: Bench, change: Callable[[Any, Any], None], code: str) -> None:
    """Foreign modules, layers, ranks, dims, DoRA, duplicates, NaN, values in the padding: by their codes."""
    write(bench.npy, [(1, 0, 4), (4, 0, 4)], change=change)
    assert code in [found for found, _ in bench.errors()]


def test_magnitudes_are_taken_as_they_are(bench: Bench) -> None:
    """The converter has divided magnitudes by the norms; those of a fused row are split as B is."""
    own = np.arange(1, 1 + Q + 2 * KV, dtype=np.float32) / 16

    def change(weights: Any, config: Any) -> None:
        weights[0, 2 * (HIDDEN + len(own)) :][: len(own)] = own
        config[0, 3] = 1

    write(bench.npy, [(0, 0, 2), (4, 0, 2)], extra=len(own), change=change)
    rows = bench.build().rows
    assert [row.row.vectors for row in rows] == [1, 1, 1, 0]
    parts = own[:Q], own[Q : Q + KV], own[Q + KV :]
    for row, part in zip(rows, parts, strict=False):
        np.testing.assert_array_equal(row.vectors[0].astype(np.float32), part)


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((2, 40), np.float64),
        np.zeros((2, 4), ">i4"),
        np.zeros((2, 2, 4), np.int32),
        np.zeros((0, 4), np.int32),
        np.zeros((3, 4), np.int32),
        np.asfortranarray(np.zeros((2, 40), np.float16)),
        np.array([{"a": 1}], dtype=object),
    ],
    ids=["float64", "big-endian", "batch-2", "empty", "rows", "fortran", "pickle"],
)
def test_files_that_are_no_such_arrays_are_refused(bench: Bench, value: Any) -> None:
    """Types, shapes and orders that TensorRT-LLM does not have, and pickles, which are never loaded."""
    for name in ("model.lora_weights.npy", "model.lora_config.npy"):
        write(bench.npy, [(1, 0, 4), (4, 0, 4)])
        np.save(bench.npy / name, value, allow_pickle=True)
        assert [code for code, _ in bench.errors()] == ["E_BAD_NPY"], name


def test_a_file_that_was_cut_off_is_refused(bench: Bench) -> None:
    """A file of another size than its header says is refused."""
    write(bench.npy, EVERY)
    path = bench.npy / "model.lora_weights.npy"
    path.write_bytes(path.read_bytes()[:-2])
    assert bench.errors() == [("E_BAD_NPY", "model.lora_weights.npy")]


@pytest.mark.parametrize(("module", "wrong"), [*zip(sorted(SIZES), (4, 5, 8) * 3, strict=True)])
def test_a_row_that_claims_a_higher_rank_over_padding_is_refused(bench: Bench, module: int, wrong: int) -> None:
    """A rank above the true one would read the first rows of B as A, and padding as the end of B."""
    write(bench.npy, [(module, 0, 3)], extra=5 * sum(SIZES[module]), change=poke(0, 2, wrong))
    assert [code for code, _ in bench.errors()] == ["E_RANK_SHAPE"]


def test_a_zero_b_that_could_be_padding_is_refused(bench: Bench) -> None:
    """A of rank 4 with zeros for B is ambiguous with A and B of rank 2 and padding, where in is out."""

    def no_b(weights: Any, config: Any) -> None:
        weights[0, 4 * HIDDEN :] = 0

    write(bench.npy, [(1, 0, 4)], change=no_b)
    assert [code for code, _ in bench.errors()] == ["E_RANK_SHAPE"]


def test_import_bundle_checks_and_says_how_to_publish(folder: Path, shared: tuple[str, str]) -> None:
    """An import without a deployment's name is a dry run."""
    write(folder / "npy", [(1, 0, 4), (18, 1, 2)])
    words = ("import-bundle", folder / "npy", "--base", folder / "base", "--name", "lora1")
    code, text, errors = run(*words, *shared)
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


WEIGHTS, CONFIG = "model.lora_weights.npy", "model.lora_config.npy"
ROWS = ((0, 0, 2), (1, 1, 4), (5, 1, 3), (18, 0, 2))


def written(folder: Path, rng: Random) -> None:
    """Write both files: as a converter does, or with numbers of the table or of the headers changed."""
    rows = rng.sample(ROWS, rng.randint(1, len(ROWS)))
    column, value = rng.randrange(8), rng.choice((-1, 0, 1, 2, 3, 5, 9, 13, 77, 2**31 - 1, -(2**31)))
    change = None if column > 3 else poke(rng.randrange(len(rows)), column, value)
    sizes = {"dtype": rng.choice(("<f2", "<f4")), "extra": rng.choice((0, 3, sum(SIZES[1])))}
    write(folder, rows, batch=False, change=change, **sizes)
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


@pytest.mark.parametrize("cases", runs(100))
def test_mutated_files_are_taken_or_refused_by_name(tmp_path: Path, cases: range) -> None:
    """A file that is accepted has the numbers that numpy reads; one that is refused has a code."""
    rules = book()
    with bounded() as watch:
        for case in cases:
            written(tmp_path, Random(case))
            with watch.case(f"seed {case}"):
                npy = read_npy_adapter(tmp_path, rules.limits.base)
                whole = npy.file and check_tensors(
                    TensorCheck(npy.file, FOLDED, rules, lambda _: None, list(npy.findings))
                )
            findings = npy.findings if whole is None else whole.findings
            check_findings(findings, case)
            refused = any(finding.code.startswith("E_") for finding in findings)
            assert refused == (whole is None or not whole.rows), case
            watch.note("refused" if refused else "accepted")
            if not refused:
                assert same_numbers(tmp_path, npy), case
