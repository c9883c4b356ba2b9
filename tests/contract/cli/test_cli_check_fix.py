"""``loramux check --fix``: the folder that it writes, its words, its document and its exit status."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.support.adapters import tensors, write_adapter, write_base
from tests.support.processes.commands import run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base; an adapter of a compiled model with a chat template beside, and one with DoRA."""
    write_base(tmp_path / "base")
    compiled = {f"_orig_mod.{name}": value for name, value in tensors().items()}
    write_adapter(tmp_path / "compiled", compiled, target_modules=["q_proj", "v_proj"])
    (tmp_path / "compiled" / "chat_template.jinja").write_text("{{ messages }}")
    write_adapter(tmp_path / "activated", alora_invocation_tokens=[3])
    return tmp_path


def test_a_fixed_folder_is_served_exactly(folder: Path) -> None:
    """The text says what changed, then what servers make of the new folder, which has the other files too."""
    at = ("--base", folder / "base", "--for", "vllm,loramux")
    code, text, errors = run("check", folder / "compiled", *at, "--fix", folder / "out")
    assert code == 0, errors
    assert text.splitlines()[:2] == [
        f"fixed: {folder / 'out'} has the same A, B and scales",
        "  8 tensors renamed, as _orig_mod.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight -> "
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    ]
    assert text.count("serves it exactly") == 2
    assert {path.name for path in (folder / "out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
    }  # fmt: skip
    found = load_file(folder / "out" / "adapter_model.safetensors")
    assert {name: value.tobytes() for name, value in found.items()} == {
        name: value.tobytes() for name, value in tensors().items()
    }


def test_json_says_the_same(folder: Path) -> None:
    """Fixed, nothing to fix and refused are outcomes; a refusal has findings, and is exit status 1."""
    rows = []
    for name, out in (("compiled", "out"), ("out", "again"), ("activated", "no")):
        arguments = ("--base", folder / "base", "--fix", folder / out, "--json")
        code, text, errors = run("check", folder / name, *arguments)
        document = json.loads(text)
        assert document["schema"] == 2, errors
        assert document["verdicts"] == []
        fix = document["fix"]
        rows.append(
            (code, fix["outcome"], fix["out"], len(fix["changes"]), [x["code"] for x in fix["findings"]])
        )
    assert rows == [
        (0, "fixed", str(folder / "out"), 1, []),
        (0, "nothing", None, 0, []),
        (1, "refused", None, 0, ["E_NO_FIX"]),
    ]
    assert not (folder / "no").exists()


def test_flags_that_do_not_go_together(folder: Path) -> None:
    """A base is needed, and no builder elsewhere; a folder that is there is not replaced."""
    code, _, errors = run("check", folder / "compiled", "--fix", folder / "out")
    assert (code, errors.endswith("Error: Missing option '--base'.\n")) == (2, True)
    at = ("--base", folder / "base", "--fix", folder / "compiled")
    code, _, errors = run("check", folder / "compiled", *at, "--builder", "localhost:1")
    assert (code, "--fix goes with neither --builder nor --truncate-to" in errors) == (2, True)
    code, _, errors = run("check", folder / "compiled", *at)
    assert (code, "found a folder with files, which are never replaced" in errors) == (2, True)
    code, _, errors = run("check", folder / "nowhere", "--base", folder / "base", "--fix", folder / "out")
    assert (code, "no such folder on this machine" in errors) == (1, True)
