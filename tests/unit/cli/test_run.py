"""``loramux run``: the deployment that words name, and the file of it."""

from pathlib import Path

import pytest

from loramux.cli.local.run import deployment_of, name_of_base, save_deployment
from loramux.cli.local.services import local_roots
from loramux_shared.deployment import SourceKind
from loramux_shared.deployment_file import load_deployment
from loramux_shared.faults import DeploymentInvalid, SettingsInvalid
from loramux_shared.spelling import parse_repository

BASE = parse_repository("hf:my-org/Base-1.5B@v2")


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("hf:my-org/Base-1.5B@v2", "Base-1.5B"),
        ("/models/qwen 2.5 (q4).gguf", "qwen-2.5-q4"),
        ("/models/big-Q4_K_M-00001-of-00003.gguf", "big-Q4_K_M"),
        ("/models/folder/", "folder"),
        ("s3://bucket/bases/small", "small"),
        ("https://host/base.tar.gz?token=secret/x", "base.tar.gz"),
        ("/模型", "base"),
    ],
)
def test_a_base_gives_its_name(word: str, name: str) -> None:
    """The last part of an address or path is the name, as far as names may have it."""
    assert name_of_base(parse_repository(word)) == name


def test_words_become_a_deployment_whose_file_says_the_same(tmp_path: Path) -> None:
    """Sources and revisions are those of the words; the file is read as the same deployment."""
    words = ["support=hf:my-org/support@main", f"mine={tmp_path}"]
    deployment = deployment_of(BASE, words, "", 128)
    support, mine = deployment.build.lora_adapters.values()
    assert (deployment.model_name, deployment.build.lora_configuration.max_lora_rank) == ("Base-1.5B", 128)
    assert (support.repo, support.revision) == ("my-org/support", "main")
    assert (mine.source, mine.repo) == (SourceKind.LOCAL, str(tmp_path))
    file = tmp_path / "deployment.yaml"
    save_deployment(deployment, file)
    assert load_deployment(file).deployment == deployment
    save_deployment(deployment, file)  # what is there already says the same


def test_services_may_read_all_files_of_a_model(tmp_path: Path) -> None:
    """One file of several is named, and the others are read too; no other file beside them is."""
    names = [f"big-0000{number}-of-00002.gguf" for number in (1, 2)]
    for name in (*names, "other.gguf"):
        (tmp_path / name).touch()
    named = parse_repository(str(tmp_path / names[1]))
    assert local_roots([named]) == [tmp_path / name for name in names]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["support"], "NAME=REPO"),
        (["a=./x", "a=./y"], "another name"),
        (["=./x"], "Begin with a letter"),
        (["a/b=./x"], "Begin with a letter"),
        (["BASE-1.5b=./x"], "differs in more than case"),
        (["a=ftp://host/x"], "names no repository"),
    ],
)
def test_words_that_name_no_adapter_are_refused(words: list[str], message: str) -> None:
    """The refusal says what was expected and found."""
    with pytest.raises(DeploymentInvalid, match=message):
        deployment_of(BASE, words, "", 64)


def test_no_other_file_is_lost(tmp_path: Path) -> None:
    """A file with other content stays, and a folder that is not there is named."""
    deployment = deployment_of(BASE, [], "", 64)
    file = tmp_path / "deployment.yaml"
    file.write_text("mine")
    for path in (file, tmp_path / "none/deployment.yaml", tmp_path):
        with pytest.raises(SettingsInvalid, match="expected a new file"):
            save_deployment(deployment, path)
    assert file.read_text() == "mine"
