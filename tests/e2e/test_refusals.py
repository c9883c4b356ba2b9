"""Mistakes of a person in a build: each has its name, and leaves nothing in the store."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from loramux.cli.main import app
from tests.e2e.test_builder_kill import builder
from tests.support.adapters import tensors, write_adapter, write_base
from tests.support.forks import inference_service
from tests.support.s3_gateway import free_port
from tests.support.waiting import BOUND_S


class Bench:
    """A running builder, and a folder with a base and one good adapter."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder = folder
        self.address = address

    def file(self, **lora: object) -> Path:
        """A deployment file over everything in the folder's adapters."""
        data = {
            "model_name": "wrong",
            "trt_llm": {
                "build": {
                    "checkpoint_repository": {"source": "LOCAL", "repo": "base"},
                    "lora_adapters": {
                        name: {"source": "LOCAL", "repo": f"adapters/{name}"}
                        for name in sorted(path.name for path in (self.folder / "adapters").iterdir())
                    },
                    **lora,
                }
            },
        }
        path = self.folder / "deployment.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    def build(self, path: Path) -> tuple[int, str]:
        """Run `loramux build` in this process; exit status and all that it printed."""
        done = CliRunner().invoke(app, ["build", str(path), "--builder", self.address])
        return done.exit_code, done.output

    def stored(self) -> list[Path]:
        """Every file in the store."""
        return [path for path in (self.folder / "store").rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder, port = tmp_path_factory.mktemp("bench"), free_port()
    with builder(folder, port):
        address = f"127.0.0.1:{port}"
        assert CliRunner().invoke(app, ["health", address, "--wait", f"{BOUND_S:.0f}"]).exit_code == 0
        yield Bench(folder, address)


@pytest.fixture
def bench(running: Bench) -> Bench:
    for name in ("adapters", "store"):
        shutil.rmtree(running.folder / name, ignore_errors=True)
    write_base(running.folder / "base")
    write_adapter(running.folder / "adapters" / "good", tensors())
    return running


def _rank(folder: Path) -> None:
    write_adapter(folder, tensors(rank=12), r=12)


def _nan(folder: Path) -> None:
    wrong = tensors()
    first = next(iter(wrong))
    wrong[first] = wrong[first].copy()
    wrong[first].flat[3] = np.nan
    write_adapter(folder, wrong)


def _other_base(folder: Path) -> None:
    wrong = {name: np.concatenate([value, value], axis=1) if "lora_A" in name else value
             for name, value in tensors().items()}  # fmt: skip
    write_adapter(folder, wrong)


def _no_weights(folder: Path) -> None:
    write_adapter(folder, tensors())
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (_rank, ["E_RANK_MAX", "12", "8"]),
        (_nan, ["E_NAN"]),
        (_other_base, ["E_DIMS", "32", "16"]),
        (_no_weights, ["E_NO_WEIGHTS", "adapter_model.safetensors"]),
    ],
    ids=["rank", "nan", "other base", "missing file"],
)
def test_a_wrong_adapter_is_refused_by_name(
    bench: Bench, make: Callable[[Path], None], expected: list[str]
) -> None:
    """The whole build is refused, with what was expected and found, and the store is as it was."""
    make(bench.folder / "adapters" / "bad")
    status, text = bench.build(bench.file(max_lora_rank=8))
    assert status == 1
    for part in ("ADAPTER_INVALID", "bad", *expected):
        assert part in text
    assert "Traceback" not in text
    assert bench.stored() == []


def test_a_misspelt_key_is_named_with_the_nearest_one(bench: Bench) -> None:
    """A typing error in the file never reaches the builder."""
    status, text = bench.build(bench.file(max_seq_length=8))
    assert status == 1
    for part in ("DEPLOYMENT_INVALID", "max_seq_length", "max_seq_len"):
        assert part in text
    assert bench.stored() == []


def test_the_good_adapter_alone_is_built(bench: Bench) -> None:
    """An adapter that was refused beside a bad one is fine without it."""
    status, text = bench.build(bench.file(max_lora_rank=8))
    assert status == 0, text
    assert any(path.name == "current.json" for path in bench.stored())


def test_an_unknown_deployment_stops_the_inference_service_with_its_name(bench: Bench) -> None:
    """A service of a deployment that was never built names it, and ends with exit status 1."""
    log = bench.folder / "inference.log"
    flags = ["--deployment", "nowhere", "--grpc", "127.0.0.1:0", "--store", f"file://{bench.folder}/store"]
    assert inference_service(flags, log).wait() == 1
    *_, line = log.read_text().splitlines()
    assert "DEPLOYMENT_NOT_FOUND" in line
    assert "'nowhere'" in line
    assert "Traceback" not in log.read_text()
