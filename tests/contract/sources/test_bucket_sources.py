import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from loramux_shared import faults
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.sources.base import Resolved
from loramux_shared.sources.bucket import BucketSource, Opener
from loramux_shared.sources.checkpoint import describe_base, fetch_base
from loramux_shared.sources.files import content_digest
from loramux_shared.sources.open import Sources
from loramux_shared.sources.retry import RetryPolicy
from loramux_shared.sources.s3 import open_bucket
from loramux_shared.sources.secrets import Secrets
from tests.support.adapters import write_base
from tests.support.descriptors import cancel_after, expect_nothing_open, keep_fault
from tests.support.s3_gateway import S3Server

FILES = {
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": bytes(range(256)) * 999,
    "optimizer.pt": bytes(99),
    "checkpoint-5/adapter_config.json": b'{"r": 5}',
}


@dataclass
class Cloud:
    """A store that speaks one cloud's protocol."""

    kind: SourceKind
    root: str
    """The address of an empty folder."""
    absent: str
    """The address of a bucket that does not exist."""
    put: Callable[[str, bytes], Any]
    secret: dict[str, str]
    wrong: dict[str, str]
    """A secret that does not open it."""
    opener: Opener = open_bucket

    def fill(self, files: dict[str, bytes]) -> None:
        """Store files below the folder."""
        for name, data in files.items():
            self.put(f"one/{name}", data)

    def repo(self, address: str = "", **fields: str) -> Repository:
        """A repository of this kind, opened by the secret `key`."""
        secret = {"runtime_secret_name": "key"}
        return Repository(source=self.kind, repo=address or self.root, **(secret | fields))

    def source(self, secret: dict[str, str] | str | None = None) -> BucketSource:
        """The source as a service opens it, with its secret in a variable."""
        text = secret if isinstance(secret, str) else json.dumps(secret or self.secret)
        secrets = Secrets(None, {"LORAMUX_SECRET_key": text} if text else {})
        return BucketSource(self.opener, secrets, RetryPolicy(attempts=2, wait_s=0.01))


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    """A folder of a bucket of the S3 gateway, which is also the one that the variables name."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    bucket, client = s3_server.new_bucket(), s3_server.client()
    secret = {
        "access_key_id": s3_server.access_key,
        "secret_access_key": s3_server.secret_key,
        "region": "us-east-1",
        "endpoint_url": s3_server.endpoint,
    }
    return Cloud(
        SourceKind.S3,
        f"s3://{bucket}/models/one",
        "s3://no-such-bucket/x",
        lambda name, data: client.put_object(Bucket=bucket, Key=f"models/{name}", Body=data),
        secret,
        secret | {"secret_access_key": "canary-of-a-wrong-key"},
    )


@pytest.fixture
def cloud(s3: Cloud) -> Cloud:
    """The store of the tests of any; test_clouds repeats them with others."""
    return s3


def test_only_the_named_files_are_fetched(cloud, tmp_path):
    """A folder is listed with sizes and checksums, named files arrive byte for byte; a subfolder is a root."""
    cloud.fill(FILES)
    cloud.put("one-more/file", b"of a neighbour")
    counted: list[int] = []
    source = cloud.source()
    resolved = source.resolve(cloud.repo())
    assert {name: file.size for name, file in resolved.files.items()} == {k: len(v) for k, v in FILES.items()}
    for name, data in FILES.items():  # of what was put in one piece; an S3 listing has none
        md5 = f"md5:{hashlib.md5(data, usedforsecurity=False).hexdigest()}"
        assert resolved.files[name].checksum == ("" if cloud.kind is SourceKind.S3 else md5)
    names = ["adapter_config.json", "adapter_model.safetensors"]
    fetched = source.fetch(resolved, names, tmp_path / "into", counted.append)
    assert {path.name: path.read_bytes() for path in (tmp_path / "into").iterdir()} == {
        k: FILES[k] for k in names
    }
    assert sum(counted) == sum(len(FILES[name]) for name in names)
    pinned = source.pin(resolved, fetched)
    assert pinned.revision == content_digest(fetched)
    assert source.pin(Resolved(pinned, resolved.files), fetched) == pinned
    other = Resolved(cloud.repo(revision="0" * 64), resolved.files)
    with pytest.raises(faults.RevisionNotFound, match="expected content 0000"):
        source.pin(other, fetched)
    below = source.resolve(cloud.repo(subfolder="checkpoint-5"))
    assert list(below.files) == ["adapter_config.json"]
    source.fetch(below, ["adapter_config.json"], tmp_path / "below")
    assert (tmp_path / "below" / "adapter_config.json").read_bytes() == b'{"r": 5}'
    with pytest.raises(faults.RepoNotFound, match="no objects found"):
        source.resolve(cloud.repo(subfolder="check"))


def test_an_object_that_changes_is_no_mix(cloud, tmp_path):
    """An object that was replaced after the listing is SOURCE_CHANGED, though its size is the same."""
    cloud.fill(FILES)
    source = cloud.source()
    resolved = source.resolve(cloud.repo())
    cloud.put("one/adapter_config.json", b"[]")
    with pytest.raises(faults.SourceChanged, match=r"adapter_config\.json: changed since it was listed"):
        source.fetch(resolved, ["adapter_config.json", "adapter_model.safetensors"], tmp_path / "into")
    with pytest.raises(faults.SourceChanged):
        source.digests(resolved, ["adapter_config.json"])
    assert not list(tmp_path.rglob("*.json"))


def test_answers_have_their_reasons(cloud):
    """A missing bucket, a wrong key and an address of another kind have different errors."""
    cloud.fill(FILES)
    with pytest.raises(faults.RepoNotFound, match=r"no such (bucket|container)"):
        cloud.source().resolve(cloud.repo(cloud.absent))
    with pytest.raises(faults.RepoGated, match="Secret 'key' is read from LORAMUX_SECRET_key"):
        cloud.source(cloud.wrong).resolve(cloud.repo())
    for address in ("https://host/x", "s3://", "gs://-", "azure://Account/x", f"{cloud.root}?signature=canary"):
        with pytest.raises(faults.SourceRefused, match=r"expected .*://") as refusal:
            cloud.source().resolve(cloud.repo(address))
        assert "canary" not in str(refusal.value)


def test_secrets_have_a_form(cloud):
    """A secret that is no JSON of the right fields is refused by its name, and its text is not repeated."""
    texts = [
        "canary",
        '["canary"]',
        '{"canary": 1}',
        json.dumps(cloud.secret | {"account_key": 7, "private_key": 7}),
    ]
    for text in texts[: 4 if cloud.kind is not SourceKind.S3 else 3]:
        with pytest.raises(faults.SourceRefused, match="secret 'key': expected") as refusal:
            cloud.source(text).resolve(cloud.repo())
        assert "canary" not in f"{refusal.value!r}"


def test_a_secret_that_is_not_set_is_reported(cloud):
    """A missing secret is an error: the server's own credentials never sign for a repository."""
    cloud.fill(FILES)
    with capture_logs() as logs, pytest.raises(faults.RepoGated, match="LORAMUX_SECRET_key"):
        cloud.source(" ").resolve(cloud.repo())
    assert logs[0]["event"] == "secret is not set, continuing without it"


def test_a_base_is_recorded_and_fetched(cloud, tmp_path):
    """A base is described without being kept; a replica fetches and verifies it, once."""
    base = write_base(tmp_path / "base")
    cloud.fill({path.name: path.read_bytes() for path in base.iterdir()})
    sources = Sources({cloud.kind: cloud.source()})
    record = describe_base(sources, cloud.repo()).record
    folder = fetch_base(record, tmp_path / "cache", sources)
    assert (folder / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    cloud.put("one/tokenizer.json", b"[]")
    assert fetch_base(record, tmp_path / "cache", sources) == folder
    with pytest.raises(faults.BundleCorrupt, match=r"tokenizer\.json"):
        fetch_base(record, tmp_path / "other", sources)


def test_without_a_secret_the_usual_variables_count(s3, monkeypatch):
    """S3 without a secret uses the AWS_* variables; without those nothing is signed."""
    s3.fill(FILES)
    assert len(s3.source().resolve(s3.repo(runtime_secret_name="")).files) == len(FILES)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(faults.RepoGated, match="Set AWS_ACCESS_KEY_ID"):
        s3.source().resolve(s3.repo(runtime_secret_name=""))


def test_nothing_stays_open(cloud, tmp_path):
    """Refused, cancelled and broken transfers leave no connection and no file, though failures are kept."""
    cloud.fill({"large": bytes(3 << 20)})
    source = cloud.source()
    source.resolve(cloud.repo())
    with expect_nothing_open() as retained:
        keep_fault(lambda: source.resolve(cloud.repo(cloud.absent)), retained)
        keep_fault(lambda: cloud.source(cloud.wrong).resolve(cloud.repo()), retained)
        resolved = source.resolve(cloud.repo())
        keep_fault(lambda: source.fetch(resolved, ["large"], tmp_path / "a", cancel_after(1 << 20)), retained)
        keep_fault(lambda: source.digests(resolved, ["large"], cancel_after(1 << 20)), retained)
        listed = Resolved(resolved.repository, {"large": replace(resolved.files["large"], size=99)})
        keep_fault(lambda: source.fetch(listed, ["large"], tmp_path / "b"), retained)
        cloud.put("one/large", b"changed")
        keep_fault(lambda: source.fetch(resolved, ["large"], tmp_path / "c"), retained)
