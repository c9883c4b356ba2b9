"""Repositories of a source that a package adds, where that package is not installed."""

import pytest
from pydantic import ValidationError

from loramux.messages import repository_from_message, repository_to_message
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import DeploymentInvalid, SourceRefused
from loramux_shared.sources.open import open_sources
from loramux_shared.spelling import parse_repository

PARROT = Repository(source=SourceKind.BY_SCHEME, repo="parrot://me:secret@cage/one?key=2", revision="3")


def test_a_repository_is_passed_on_without_its_package() -> None:
    """Clients, records and replicas need nothing of a source that only a builder has."""
    assert repository_from_message(repository_to_message(PARROT)) == PARROT
    assert Repository.model_validate_json(PARROT.model_dump_json()) == PARROT
    assert (PARROT.source_name, PARROT.label) == ("parrot://", "parrot://cage/one")


def test_an_unknown_scheme_is_refused_with_those_that_are_known() -> None:
    """A builder lists its sources, and a reader of words its schemes."""
    with pytest.raises(SourceRefused) as refused:
        open_sources().of(PARROT)
    known = "AZURE, GCS, HF, LOCAL, MLFLOW, OCI, REMOTE_URL, S3"
    assert refused.value.message == f"source parrot:// is not supported here; supported: {known}"
    with pytest.raises(DeploymentInvalid) as invalid:
        parse_repository("parrot://cage/one")
    assert "s3://, gs://, azure://, https://, oci://, mlflow://, each" in invalid.value.findings[0].expected


@pytest.mark.parametrize("repo", ["cage/one", "://cage", "/parrot://cage"])
def test_a_source_is_named_by_a_scheme(repo: str) -> None:
    """An address without one names no source."""
    with pytest.raises(ValidationError, match="begins with the scheme of its source"):
        Repository(source=SourceKind.BY_SCHEME, repo=repo)
