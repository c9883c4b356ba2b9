"""``loramux check`` and ``prove``: text, JSON and exit status."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builder_service.pipeline.context import BuildContext
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.support.adapters import tensors, write_adapter, write_base
from tests.support.builders import serve_builder
from tests.support.hub import serve_hub
from tests.support.processes.commands import run
from tests.support.services.fake_grpc import Fakes, deployment_text
from tests.support.waiting import in_thread


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base, an adapter that is fine, one that is not."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "fine", base_model_name_or_path="base")
    write_adapter(tmp_path / "deep", tensors(rank=80), r=80)
    return tmp_path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The flag that names a builder, which may read all that is made here, and whose hub has nothing."""
    folder = tmp_path_factory.mktemp("builder")
    with serve_hub() as hub:
        sources = open_sources(local_roots=[folder.parent], hub_endpoint=hub.endpoint)
        with in_thread(serve_builder(BuildContext(MemoryStore(), sources, folder / "work"))) as address:
            yield "--builder", address


def test_a_report_for_people(folder: Path) -> None:
    """A private builder is started and leaves nothing; rows are collapsed by module; exit 0."""
    code, text, errors = run("check", folder / "fine", "--base", folder / "base")
    assert code == 0, errors
    lines = text.splitlines()
    assert lines[0].startswith(f"adapter  LOCAL {folder / 'fine'} @ ")
    assert "kind     LoRA" in lines
    assert any(line.split()[:4] == ["attn_q", "0-1", "4", "2"] for line in lines)
    assert any(line.split()[:4] == ["attn_v", "0-1", "4", "2"] for line in lines)
    assert lines[-1] == "accepted: no errors, no warnings"


def test_a_refused_adapter_is_exit_1_with_its_fix(folder: Path, shared: tuple[str, str]) -> None:
    """A violation shows its code, place, expectation, finding and cure, each on a line."""
    code, text, _ = run("check", folder / "deep", "--base", folder / "base", *shared)
    assert code == 1
    assert "E_RANK_MAX  layer 0 q_proj" in text
    assert "  expected rank <= max_lora_rank 64" in text
    assert "  fix      Set max_lora_rank to at least 80." in text
    assert text.splitlines()[-1].startswith("refused: 1 error")


def test_json_is_stable_and_alone_on_stdout(folder: Path, shared: tuple[str, str]) -> None:
    """The JSON has every documented field, whether the adapter is accepted or refused."""
    fields = {
        "schema", "accepted", "adapter", "base", "base_model_name", "dtype", "bundle_bytes", "files",
        "findings", "rows", "licence", "base_licence", "kinds", "replaced_rows", "invocation_tokens",
        "labels", "problem_type",
    }  # fmt: skip
    reports: dict[str, Any] = {}
    for name, expected in (("fine", 0), ("deep", 1)):
        code, text, _ = run("check", folder / name, "--base", folder / "base", "--json", *shared)
        assert code == expected
        reports[name] = json.loads(text)
        assert set(reports[name]) == fields
    assert (reports["fine"]["schema"], reports["fine"]["accepted"]) == (2, True)
    assert (reports["fine"]["kinds"], reports["deep"]["kinds"]) == (["lora"], [])
    assert set(reports["fine"]["rows"][0]) == {
        "layer", "module_id", "module", "rank", "in_features", "out_features", "scale", "norm_a", "norm_b",
        "norm_ba", "truncated_from", "truncation_error", "expert", "vectors",
    }  # fmt: skip
    [finding] = [item for item in reports["deep"]["findings"] if item["code"].startswith("E_")]
    assert set(finding) == {"code", "where", "expected", "found", "fix"}


def test_what_is_not_there_is_one_line(folder: Path, shared: tuple[str, str]) -> None:
    """A repository that cannot be read is a failure, not a report."""
    code, text, errors = run("check", f"{folder}/nowhere", "--base", folder / "base", *shared)
    assert (code, text) == (1, "")
    assert "error: REPO_NOT_FOUND: LOCAL" in errors
    assert run("check", "no repository", "--base", "x/y", *shared)[0] == 1


@pytest.mark.parametrize(
    ("adapter", "base", "missing"),
    [("adapters/pirat", "{}/base", "adapters/pirat"), ("{}/base", "org/bas", "org/bas")],
)
def test_a_mistyped_folder_is_no_mystery(
    folder: Path, shared: tuple[str, str], adapter: str, base: str, missing: str
) -> None:
    """A word that could be of the hub is looked for there; a failure says that no such folder is here."""
    code, _, errors = run("check", adapter.format(folder), "--base", base.format(folder), *shared)
    assert code == 1
    assert f"If a folder was meant: there is no {missing} here." in errors


def test_wishes_of_the_command_line_reach_the_builder(tmp_path: Path, fakes: Fakes) -> None:
    """``build --truncate-to R --prove`` and ``prove`` are the file with these two fields set."""
    path = tmp_path / "d.yaml"
    path.write_text(deployment_text("wishes", "a"))
    at = ("--builder", fakes.builder_address)
    for args, expected in (
        (("build", path, *at), (0, False)),
        (("build", path, "--truncate-to", "8", "--prove", *at), (8, True)),
        (("prove", path, *at), (0, True)),
    ):
        assert run(*args)[0] == 0
        spec = fakes.builder.specs["wishes"]
        assert (spec.truncate_to_rank, spec.prove) == expected
