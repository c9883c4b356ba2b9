"""Aliases, limits and drafts in files, messages, generations and keys; and repositories in one word."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from loramux.builder.v1 import builder_pb2 as pb
from loramux.messages import deployment_from_message, deployment_to_message
from loramux_shared.access.keys import parse_keys
from loramux_shared.deployment import Deployment, Repository, SourceKind
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.faults import DeploymentInvalid, SettingsInvalid
from loramux_shared.runtime import Limits
from loramux_shared.spelling import parse_repository
from scripts.deployment_doc import MORE
from tests.support.cases import cases

ADAPTERS = ("support-v1", "support-v2")


def parsed(runtime: Any, name: str = "d") -> Deployment:
    """A deployment of two adapters with a runtime block."""
    repository = {"source": "HF", "repo": "org/one"}
    build = {"checkpoint_repository": repository, "lora_adapters": dict.fromkeys(ADAPTERS, repository)}
    return parse_deployment({"model_name": name, "build": build, "runtime": runtime}).deployment


def test_the_example_of_the_page_means_what_it_says() -> None:
    """A limit that a model does not set is the default's; a model that is not named has the default."""
    runtime = parsed(yaml.safe_load(MORE)["runtime"]).runtime
    assert runtime.aliases == {"support": {"support-v1": 90, "support-v2": 10}}
    assert runtime.limits.of("support-v2") == runtime.limits.of("d") == Limits(max_waiting=64)
    own = Limits(weight=4, max_running=8, max_waiting=64, tokens_per_minute=200000)
    assert runtime.limits.of("support-v1") == own


@pytest.mark.parametrize(("runtime", "where", "expected"), cases(__file__, "test_what_is_refused"))
def test_what_is_refused(runtime: Any, where: str, expected: str) -> None:
    """A runtime that cannot be served is refused with its field and what is expected."""
    with pytest.raises(DeploymentInvalid) as refused:
        parsed(runtime)
    [finding] = refused.value.findings
    assert finding.where == where
    assert expected in finding.expected


def test_a_message_says_the_same() -> None:
    """A message has every field of the file, and no other."""
    runtime = {
        "aliases": {"a": {"support-v1": 1, "support-v2": 0}},
        "limits": {"default": {"weight": 0.5}, "models": {"d": {"tokens_per_minute": 2**40}, "support-v1": {}}},
    }
    drafts = [parsed({"speculative_tokens": tokens}) for tokens in (0, 5, None)]
    assert [deployment.runtime.speculative_tokens for deployment in drafts] == [0, 5, None]
    kinds = [parsed({"quantization": kind}) for kind in ("none", "fp8", "int8", "int4")]
    draft = parsed(
        {"speculator": {"model": {"source": "HF", "repo": "org/small", "revision": "a"}, "tokens": 3}}
    )
    reads = parsed({"tool_parser": "hermes", "reasoning_parser": "none", "pooling": "mean"})
    for deployment in (parsed(runtime), parsed({}), *drafts, *kinds, draft, reads):
        assert deployment_from_message(deployment_to_message(deployment)) == deployment


def test_an_alias_comes_once_in_a_message() -> None:
    """An alias that comes twice with different models is not taken silently."""
    message = deployment_to_message(parsed({}))
    for weight in (1, 2):
        message.aliases.append(pb.Alias(name="a", weights={"d": weight}))
    with pytest.raises(DeploymentInvalid, match="alias names must be distinct, found twice: a"):
        deployment_from_message(message)


@pytest.mark.parametrize(("scopes", "limits", "expected"), cases(__file__, "test_limits_that_no_key_can_have"))
def test_limits_that_no_key_can_have(scopes: list[str], limits: dict[str, Any], expected: str) -> None:
    """A limit of a key that is out of bounds, or without a right to infer, is refused."""
    line = json.dumps({"id": "a", "sha256": "0" * 64, "scopes": scopes, "limits": limits})
    with pytest.raises(SettingsInvalid, match=expected):
        parse_keys(line, "f")


@pytest.mark.parametrize(
    ("word", "kind", "repo", "revision", "subfolder"), cases(__file__, "test_words_of_sources_far_away")
)
def test_words_of_sources_far_away(word, kind, repo, revision, subfolder, tmp_path: Path) -> None:
    """Every source has a spelling, and a revision and a folder have their places in it."""
    (tmp_path / "here").mkdir()
    expected = Repository(source=SourceKind(kind), repo=repo, revision=revision, subfolder=subfolder)
    assert parse_repository(word, tmp_path) == expected


@pytest.mark.parametrize("word", ["here", "./here", "local:here", "here/../here", "."])
def test_a_folder_that_exists_comes_before_the_hub(word: str, tmp_path: Path) -> None:
    """A word that is a folder is this folder, not a repository of the hub."""
    (tmp_path / "here").mkdir()
    found = parse_repository(word, tmp_path)
    assert found.source is SourceKind.LOCAL
    assert Path(found.repo).is_relative_to(tmp_path)
    assert Path(found.repo).is_absolute()


@pytest.mark.parametrize("word", cases(__file__, "WORDS_REFUSED"))
def test_other_words_are_refused_with_the_grammar(word: str, tmp_path: Path) -> None:
    """A word that is no repository is refused with the grammar, and secrets in it are not shown."""
    with pytest.raises(DeploymentInvalid) as error:
        parse_repository(word, tmp_path)
    assert "org/name[@revision]" in error.value.findings[0].expected
    assert "SECRET" not in str(error.value)
