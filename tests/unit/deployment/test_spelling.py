"""Repositories in one word."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import DeploymentInvalid
from loramux_shared.spelling import parse_repository


@pytest.mark.parametrize(
    ("word", "kind", "repo", "revision", "subfolder"),
    [
        ("org/name", SourceKind.HF, "org/name", "", ""),
        ("org/name@v1.0", SourceKind.HF, "org/name", "v1.0", ""),
        ("org/name@refs/pr/3#checkpoint-500", SourceKind.HF, "org/name", "refs/pr/3", "checkpoint-500"),
        ("hf:here", SourceKind.HF, "here", "", ""),
        ("gpt2", SourceKind.HF, "gpt2", "", ""),
        ("s3://bucket/a/b#lora", SourceKind.S3, "s3://bucket/a/b", "", "lora"),
        ("gs://bucket/a", SourceKind.GCS, "gs://bucket/a", "", ""),
        ("azure://account/box/a", SourceKind.AZURE, "azure://account/box/a", "", ""),
        ("https://host/a.tar.gz?sig=1", SourceKind.REMOTE_URL, "https://host/a.tar.gz?sig=1", "", ""),
    ],
)
def test_words_of_sources_far_away(
    word: str, kind: SourceKind, repo: str, revision: str, subfolder: str, tmp_path: Path
) -> None:
    """Every source has a spelling, and a revision and a folder have their places in it."""
    (tmp_path / "here").mkdir()
    expected = Repository(source=kind, repo=repo, revision=revision, subfolder=subfolder)
    assert parse_repository(word, tmp_path) == expected


@pytest.mark.parametrize("word", ["here", "./here", "local:here", "here/../here", "."])
def test_a_folder_that_exists_comes_before_the_hub(word: str, tmp_path: Path) -> None:
    """A word that names a folder is that folder, as an absolute path."""
    (tmp_path / "here").mkdir()
    found = parse_repository(word, tmp_path)
    assert found.source is SourceKind.LOCAL
    assert Path(found.repo).is_relative_to(tmp_path)
    assert Path(found.repo).is_absolute()


@pytest.mark.parametrize(
    "word",
    ["", "a/b/c", "ftp://host/x", "http://host/x.tar.gz", "s3://", "org/name#../up", "a b", "org/x@", "a\0b"],
)
def test_other_words_are_refused_with_the_grammar(word: str, tmp_path: Path) -> None:
    """A word that names no repository is refused, and the finding has the grammar."""
    with pytest.raises(DeploymentInvalid) as error:
        parse_repository(word, tmp_path)
    assert "org/name[@revision]" in error.value.findings[0].expected


def test_a_signature_is_not_repeated(tmp_path: Path) -> None:
    """The query of an address that is refused does not stand in the message."""
    with pytest.raises(DeploymentInvalid) as error:
        parse_repository("http://host/x?sig=SECRET", tmp_path)
    assert "SECRET" not in str(error.value)
