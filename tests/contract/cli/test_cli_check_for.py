"""``loramux check --for``: verdicts about other servers as text, JSON, SARIF and JUnit, and exit status."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from loramux.cli.check_for import Question, verdicts_of
from loramux.servers.verdicts import Outcome
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.sources.open import open_sources
from tests.support.adapters import tensors, write_adapter, write_base
from tests.support.hub import HubRepo, serve_hub
from tests.support.processes.commands import run

COMMIT = "c" * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter that is fine, one of a compiled model, one with rsLoRA, and one with DoRA."""
    write_adapter(tmp_path / "fine")
    compiled = {f"_orig_mod.{name}": value for name, value in tensors().items()}
    write_adapter(tmp_path / "compiled", compiled, target_modules=["q_proj", "v_proj"])
    write_adapter(tmp_path / "rs", use_rslora=True)
    write_adapter(tmp_path / "dora", use_dora=True)
    write_base(tmp_path / "base")
    return tmp_path


def test_a_table_with_the_cause_and_the_cure(folder: Path) -> None:
    """No base is needed, and no builder is started; what is not exact is explained."""
    code, text, errors = run("check", folder / "compiled", "--for", "vllm,sglang")
    assert (code, errors) == (1, "")
    rows = [line.split("  ") for line in text.splitlines()[:3]]
    assert [row[0] for row in rows] == ["server", "vLLM", "SGLang"]
    assert "loads it and ignores all of 8 tensors" in text
    assert "  fix      Unwrap the model before you save it" in text
    assert " and 3 more\n" in text


@pytest.mark.parametrize(
    ("adapter", "fail_on", "expected"),
    [
        ("fine", "unknown", 0),
        ("dora", "refused", 1),
        ("dora", "ignored", 0),
        ("compiled", "ignored", 1),
        ("compiled", "never", 0),
    ],
)
def test_the_exit_status_follows_fail_on(folder: Path, adapter: str, fail_on: str, expected: int) -> None:
    """`ignored` is about servers that answer wrongly, `refused` about those that refuse too."""
    assert run("check", folder / adapter, "--for", "vllm", "--fail-on", fail_on)[0] == expected


def test_json(folder: Path) -> None:
    """The document has every field of each verdict."""
    code, text, _ = run("check", folder / "rs", "--for", "vllm,llama.cpp", "--json")
    document = json.loads(text)
    assert code == 1
    assert document["schema"] == 2
    assert [each["outcome"] for each in document["verdicts"]] == ["exact", "other"]
    assert set(document["verdicts"][1]) == {
        "server", "version", "outcome", "verdict", "why", "fix", "source", "known_by", "tensors", "concerned",
    }  # fmt: skip


def test_sarif(folder: Path) -> None:
    """A result has a rule, a level, a text and the config's place."""
    _, text, _ = run("check", folder / "dora", "--for", "vllm,peft", "--format", "sarif")
    (found,) = json.loads(text)["runs"]
    (result,) = found["results"]
    assert (result["ruleId"], result["level"]) == ("vllm/refused", "error")
    assert "vLLM does not yet support DoRA." in result["message"]["text"]
    place = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert place.endswith("dora/adapter_config.json")
    assert [rule["id"] for rule in found["tool"]["driver"]["rules"]] == ["vllm/refused"]


def test_junit(folder: Path) -> None:
    """Each server is a case; what is unknown is skipped."""
    _, text, _ = run("check", folder / "compiled", "--for", "loramux,vllm,sglang", "--format", "junit")
    suite = ElementTree.fromstring(text)  # noqa: S314 - our own
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "1", "1")
    assert [[part.tag for part in case] for case in suite] == [["skipped"], ["failure"], []]
    assert " and 3 more: " in (suite[1][0].text or "")


def test_our_own_verdict_is_the_builders(folder: Path) -> None:
    """With a base, a builder says what loramux does."""
    arguments = ("--base", folder / "base", "--for", "loramux", "--json", "--max-rank", "2")
    code, text, errors = run("check", folder / "fine", *arguments)
    assert code == 1, errors
    (verdict,) = json.loads(text)["verdicts"]
    assert (verdict["outcome"], verdict["source"]) == ("refused", "E_RANK_MAX")


def test_an_unknown_server_and_a_missing_base(folder: Path) -> None:
    """Both are refused before anything is read."""
    code, _, errors = run("check", folder / "fine", "--for", "vlm")
    assert code == 2
    assert "--for: expected loramux, vllm, sglang, llama.cpp, tensorrt-llm, peft, found 'vlm'" in errors
    code, _, errors = run("check", folder / "fine")
    assert code == 2
    assert errors.endswith("Error: Missing option '--base'.\n")
    code, _, errors = run("check", folder / "nowhere", "--for", "vllm")
    assert code == 1
    assert "no such folder on this machine" in errors


def test_an_adapter_of_the_hub(folder: Path) -> None:
    """A config is fetched, and the header of the weights; no pickle, and no tensor."""
    wide = {
        f"_orig_mod.{name}": np.zeros((4, 1 << 14)[:: 1 if "_A." in name else -1], np.float32)
        for name in tensors()
    }
    write_adapter(folder / "wide", wide, target_modules=["q_proj", "v_proj"])
    files = {path.name: path.read_bytes() for path in (folder / "wide").iterdir()}
    with serve_hub() as hub:
        hub.repos["org/compiled"] = HubRepo({"main": COMMIT}, files)
        hub.repos["org/pickled"] = HubRepo(
            {"main": COMMIT}, {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": b"x"}
        )
        sources = open_sources(hub_endpoint=hub.endpoint)
        outcomes = []
        for name in ("org/compiled", "org/pickled"):
            adapter = Repository(source=SourceKind.HF, repo=name)
            outcomes += [
                each.outcome for each in verdicts_of(Question(adapter, None, ("vllm",), 64, None, sources))
            ]
        assert hub.sent_bytes < 1 << 18 < len(files["adapter_model.safetensors"])
    assert outcomes == [Outcome.IGNORED, Outcome.UNKNOWN]
