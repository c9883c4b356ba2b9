"""Sources S3, GCS and AZURE, with emulators: the rules of all object stores, and no secret in a failure."""

import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from loramux_shared.deployment import SourceKind
from loramux_shared.sources import azure, gcs, s3
from loramux_shared.sources.bucket import BucketSource
from loramux_shared.sources.open import open_sources
from tests.contract.sources import test_bucket_sources as any_store
from tests.contract.sources.test_bucket_sources import (
    Cloud,
    test_a_base_is_recorded_and_fetched as test_a_base_is_recorded_and_fetched,
    test_an_object_that_changes_is_no_mix as test_an_object_that_changes_is_no_mix,
    test_answers_have_their_reasons as test_answers_have_their_reasons,
    test_nothing_stays_open as test_nothing_stays_open,
    test_only_the_named_files_are_fetched as test_only_the_named_files_are_fetched,
    test_secrets_have_a_form as test_secrets_have_a_form,
)
from tests.contract.sources.test_source_secrets import CANARY, PATIENCE, repo, secrets_of, silence
from tests.support.azurite import ACCOUNT, azurite
from tests.support.gcs_emulator import TOKEN, serve_gcs
from tests.support.s3_gateway import S3Server


@pytest.fixture(scope="module")
def emulated() -> Iterator[Any]:
    """Azurite, started at its first use."""
    with azurite() as server:
        yield server


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """A folder of a bucket of the GCS emulator."""
    with serve_gcs("models-bucket") as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
        yield Cloud(
            SourceKind.GCS,
            "gs://models-bucket/models/one",
            "gs://no-such-bucket/x",
            lambda name, data: server.put("models-bucket", f"models/{name}", data),
            server.account,
            server.account | {"private_key_id": "another"},
            gcs.open_bucket,
        )


@pytest.fixture
def blobs(emulated: Any) -> Cloud:
    """A folder of a container of Azurite."""
    name = f"c{uuid.uuid4().hex[:12]}"
    container = emulated.client().create_container(name)
    secret = {"account_key": emulated.account_key, "endpoint_url": emulated.endpoint_url}
    return Cloud(
        SourceKind.AZURE,
        f"azure://{ACCOUNT}/{name}/models/one",
        f"azure://{ACCOUNT}/nowhere/x",
        lambda name, data: container.upload_blob(f"models/{name}", data, overwrite=True),
        secret,
        secret | {"account_key": "Y2FuYXJ5LW9mLWEtd3Jvbmcta2V5"},
        azure.open_bucket,
    )


@pytest.fixture(params=["google", "blobs"])
def cloud(request: pytest.FixtureRequest) -> Cloud:
    made: Cloud = request.getfixturevalue(request.param)
    return made


def test_a_secret_that_is_not_set_is_reported(google: Cloud) -> None:
    """A request without the named secret is refused, and not signed."""
    any_store.test_a_secret_that_is_not_set_is_reported(google)


@pytest.mark.parametrize(("kind", "address"), [("GCS", "gs://x"), ("AZURE", "azure://x"), ("S3", "s3://x")])
def test_sources_of_a_builder_know_all(kind: str, address: str) -> None:
    """A wrong address is refused by the extension's rules."""
    source = open_sources().of(repo(kind, address))
    with pytest.raises(Exception, match=f"{kind} '{address}': expected"):
        source.resolve(repo(kind, address))


def _fails(caplog: Any, cloud: Any, secret: dict[str, str] | str, address: str, *hidden: str) -> None:
    """Check that a source fails, without the secrets in its failure."""
    kind = {gcs: "GCS", azure: "AZURE", s3: "S3"}[cloud]
    with silence(caplog, *hidden):
        BucketSource(cloud.open_bucket, secrets_of(secret), PATIENCE).resolve(repo(kind, address))


def test_gcs(caplog, monkeypatch):
    """Private keys and tokens are in no failure: no grant, absent, busy, or a secret of another form."""
    with serve_gcs("bucket") as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
        hidden = TOKEN, server.account["private_key"].splitlines()[3]
        own = {"private_key_id": CANARY}, {"private_key": CANARY}, {"token_uri": "http://127.0.0.1:9/token"}
        for secret in (*(server.account | each for each in own), CANARY):
            _fails(caplog, gcs, secret, "gs://bucket/x", *hidden)
        for address in ("gs://no-such-bucket/x", f"gs://bucket/x?sig={CANARY}"):
            _fails(caplog, gcs, server.account, address, *hidden)
        server.failures[:] = [503, 503]
        _fails(caplog, gcs, server.account, "gs://bucket/x", *hidden)


def test_azure(caplog):
    """Account keys are in no failure: refused, absent, unreachable, or a secret of another form."""
    with azurite() as server:
        good = {"account_key": server.account_key, "endpoint_url": server.endpoint_url}
        nowhere = {"endpoint_url": f"http://127.0.0.1:9/{ACCOUNT}"}
        own = {"account_key": "Y2FuYXJ5"}, {"account_key": CANARY}, nowhere, {"endpoint_url": CANARY}
        for secret in (*(good | each for each in own), CANARY):
            _fails(caplog, azure, secret, f"azure://{ACCOUNT}/c/x", server.account_key, "Y2FuYXJ5")
        for address in (f"azure://{ACCOUNT}/absent/x", f"azure://{ACCOUNT}/c/x?sig={CANARY}"):
            _fails(caplog, azure, good, address, server.account_key)


def test_s3(caplog, s3_server: S3Server):
    """Keys and session tokens are in no failure: refused, absent, unreachable, or a secret of another form."""
    good = {"access_key_id": s3_server.access_key, "secret_access_key": s3_server.secret_key}
    good["endpoint_url"] = s3_server.endpoint
    wrong, nowhere = {"secret_access_key": CANARY}, {"endpoint_url": "http://127.0.0.1:9"}
    own = wrong, {"access_key_id": CANARY, "session_token": CANARY}, wrong | nowhere, {"endpoint_url": CANARY}
    for secret in (*(good | each for each in own), CANARY, json.dumps([CANARY])):
        _fails(caplog, s3, secret, "s3://bucket/x", s3_server.secret_key)
    for address in ("no-such-bucket/x", f"bucket/x?X-Amz-Signature={CANARY}", f"{CANARY}@bucket/x"):
        _fails(caplog, s3, good, f"s3://{address}", s3_server.secret_key)
