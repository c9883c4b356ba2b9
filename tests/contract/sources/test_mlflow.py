"""MLFLOW: artifacts of registered models and runs, from a server that speaks the tracking server's protocol."""

import base64
import json
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from loramux_shared import faults
from loramux_shared.sources.files import content_digest
from loramux_shared.sources.mlflow import MAX_ANSWER, MlflowSource, open_bucket
from loramux_shared.sources.secrets import Secrets
from loramux_shared.spelling import parse_repository
from tests.contract.sources.test_source_secrets import CANARY, PATIENCE, silence
from tests.support.cases import cases
from tests.support.http_server import QuietHandler, serve_http
from tests.support.s3_gateway import S3Server

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 99, "check/x": b"1"}
ROOT = "mlflow-artifacts:/0/a1/artifacts"
LISTING = "/api/2.0/mlflow-artifacts/artifacts"


class Tracking:
    """A tracking server with one run, `a1`, whose folder `out` is each version of the model `my lora`."""

    def __init__(self) -> None:
        self.uri = ""
        self.files = dict(FILES)
        self.root = ROOT
        self.alias = "2"
        self.authorization: str | None = None
        """The header that every request must have."""
        self.broken: dict[str, tuple[int, bytes]] = {}
        """Answers by path, in place of the right ones."""

    def answer(self, path: str, query: dict[str, str]) -> Any:
        """Return what the server answers: an object, the bytes of a file, or None where nothing is."""
        model = (query.get("name"), query.get("version"), query.get("alias"))
        match path.removeprefix("/api/2.0/mlflow"):
            case "/registered-models/alias" if model == ("my lora", None, "prod"):
                return {"model_version": {"version": self.alias}}
            case "/model-versions/get-download-uri" if model in {("my lora", each, None) for each in "12"}:
                return {"artifact_uri": "runs:/a1/out" if model[1] == "1" else f"{self.root}/out"}
            case "/runs/get" if query["run_id"] == "a1":
                return {"run": {"info": {"artifact_uri": self.root}}}
            case "-artifacts/artifacts":
                return {"files": self.listing(query["path"].removeprefix("0/a1/artifacts/out"))}
        name = unquote(path).removeprefix(f"{LISTING}/0/a1/artifacts/out/")
        return self.files.get(name)

    def listing(self, folder: str) -> list[dict[str, Any]]:
        """Return the entries of a folder, as the server lists them: by their names in it."""
        prefix = f"{folder.strip('/')}/".removeprefix("/")
        inner = {key.removeprefix(prefix): data for key, data in self.files.items() if key.startswith(prefix)}
        folders = {name.partition("/")[0] for name in inner if "/" in name}
        files = [{"path": name, "file_size": len(data)} for name, data in inner.items() if "/" not in name]
        return [*files, *({"path": name, "is_dir": True} for name in folders)]

    def source(self, **environment: str) -> MlflowSource:
        """Return a source whose variables name this server, and others of these."""
        secrets = Secrets(None, {"MLFLOW_TRACKING_URI": self.uri} | environment)
        return MlflowSource(open_bucket, secrets, PATIENCE)

    def read(
        self, word: str, into: Path, revision: str = "", **environment: str
    ) -> tuple[str, dict[str, bytes]]:
        source = self.source(**environment)
        repository = parse_repository(word).model_copy(update={"revision": revision})
        resolved = source.resolve(repository)
        fetched = source.fetch(resolved, resolved.files, into)
        assert source.digests(resolved, resolved.files) == fetched
        pinned = source.pin(resolved, fetched)
        digest = pinned.revision.partition("-")[2]
        assert digest == content_digest(fetched)
        assert (resolved.digest(fetched) is None) == self.root.startswith("mlflow")
        return pinned.revision, {name: (into / name).read_bytes() for name in fetched}


@pytest.fixture
def tracking() -> Iterator[Tracking]:
    """A tracking server on a free port."""
    tracking = Tracking()

    class Handler(QuietHandler):
        def do_GET(self) -> None:  # noqa: N802 - the base class's name
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            if parts.path in tracking.broken:
                self.answer(*tracking.broken[parts.path], Location=f"{tracking.uri}/elsewhere")
            elif tracking.authorization and self.headers["Authorization"] != tracking.authorization:
                self.answer(401, b"You are not authenticated.")
            elif (found := tracking.answer(parts.path, query)) is None:
                self.answer(404, b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}')
            else:
                self.answer(200, found if isinstance(found, bytes) else json.dumps(found).encode())

    with serve_http(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as address:
        tracking.uri = f"http://{address}"
        yield tracking


@pytest.mark.parametrize(("word", "identity"), cases(__file__, "ADDRESSES"))
def test_every_address_is_read(tracking: Tracking, tmp_path: Path, word: str, identity: str) -> None:
    """The revision is the id of the model's version, or of the run, with the digest of the files."""
    revision, files = tracking.read(word, tmp_path / "new")
    assert (revision.partition("-")[0], files) == (identity, FILES)
    assert tracking.read(f"{word}#check", tmp_path / "folder")[1] == {"x": b"1"}
    tracking.files["adapter_config.json"] = b"[]"
    with pytest.raises(faults.RevisionNotFound):
        tracking.read(word, tmp_path / "changed", revision)


def test_a_revision_pins_an_alias(tracking: Tracking, tmp_path: Path) -> None:
    """A pinned alias is the version that it named; what moves or goes during a build is SOURCE_CHANGED."""
    word = "mlflow://my%20lora@prod"
    revision, _ = tracking.read(word, tmp_path / "one")
    source, repository = tracking.source(), parse_repository(word)
    resolved = source.resolve(repository)
    tracking.alias = "1"
    assert tracking.read(word, tmp_path / "two", revision) == (revision, FILES)
    with pytest.raises(faults.SourceChanged, match="the alias moved"):
        source.fetch(resolved, FILES, tmp_path)
    resolved = source.resolve(repository)
    del tracking.files["check/x"]
    with pytest.raises(faults.SourceChanged, match="was deleted"):
        source.fetch(resolved, FILES, tmp_path)
    assert repository.label == word
    assert parse_repository(f"mlflow://ann:{CANARY}@host/x").label == "mlflow://host/x"


def test_artifacts_in_a_bucket_are_read_there(
    tracking: Tracking, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Artifacts that the server has in S3 are read as the source S3 reads them."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = s3_server.new_bucket()
    for name, data in FILES.items():
        s3_server.client().put_object(Bucket=bucket, Key=f"a1/out/{name}", Body=data)
    tracking.root = f"s3://{bucket}/a1"
    assert tracking.read("mlflow://my%20lora/2", tmp_path)[1] == FILES


BASIC = "Basic " + base64.b64encode(b"ann:pw").decode()
USER = {"MLFLOW_TRACKING_USERNAME": "ann", "MLFLOW_TRACKING_PASSWORD": "pw"}


@pytest.mark.parametrize(
    ("header", "environment", "secret"),
    [
        (BASIC, USER, {}),
        ("Bearer t", {"MLFLOW_TRACKING_TOKEN": "t"}, {}),
        (BASIC, {}, {"username": "ann", "password": "pw"}),
        ("Bearer t", USER | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, {"tracking_uri": "", "token": "t"}),
    ],
)
def test_credentials_open_a_server(
    tracking: Tracking, header: str, environment: dict[str, str], secret: dict[str, str]
) -> None:
    """Credentials are those of MLflow's variables or of the secret, which may name another server."""
    tracking.authorization = header
    secret = {name: value or tracking.uri for name, value in secret.items()}
    source = tracking.source(LORAMUX_SECRET_key=json.dumps(secret) if secret else "", **environment)
    repository = parse_repository("mlflow://runs/a1/out")
    repository = repository.model_copy(update={"runtime_secret_name": "key" if secret else ""})
    assert source.resolve(repository).files.keys() == FILES.keys()
    tracking.authorization = "another"
    with pytest.raises(faults.RepoGated, match=r"refused \(401\)"):
        source.resolve(repository)
    no_header = {"MLFLOW_TRACKING_TOKEN": "\u20ac"}
    with pytest.raises(faults.SourceRefused, match="authorizes"):
        tracking.source(**no_header).resolve(parse_repository("mlflow://runs/a1/out"))


@pytest.mark.parametrize(
    "root", ["mlflow-artifacts://other:1/x", "http://other/x", "gs://b/x", "/data", "dbfs:/x"]
)
def test_other_stores_are_refused(tracking: Tracking, root: str) -> None:
    """Artifacts at another host get no credentials, and stores that are not read are named."""
    tracking.root = root
    with pytest.raises(faults.SourceRefused, match="its artifacts are at"):
        tracking.source().resolve(parse_repository("mlflow://runs/a1/out"))


@pytest.mark.parametrize("uri", ["", "databricks", "sqlite:///m.db", f"http://ann:{CANARY}@host", "http://["])
def test_servers_have_an_address(tracking: Tracking, caplog: pytest.LogCaptureFixture, uri: str) -> None:
    """Without the address of a server, or with a password in it, nothing is read."""
    with silence(caplog):
        tracking.source(MLFLOW_TRACKING_URI=uri).resolve(parse_repository("mlflow://runs/a1/out"))


@pytest.mark.parametrize(("word", "fault"), cases(__file__, "test_wrong_addresses"))
def test_wrong_addresses(tracking: Tracking, word: str, fault: str) -> None:
    """An address that names nothing is refused by name."""
    with pytest.raises(getattr(faults, fault), match=r"not a path|MLFLOW mlflow://"):
        tracking.source().resolve(parse_repository(word))


LONG = [("[" * 99999, "SourceRefused"), (" " * (MAX_ANSWER + 1), "SourceRefused")]


@pytest.mark.parametrize(("body", "fault"), LONG + cases(__file__, "test_answers_are_untrusted"))
def test_answers_are_untrusted(tracking: Tracking, body: Any, fault: str) -> None:
    """Listings that lead outside, have no end or are not MLflow's are refused by name."""
    tracking.broken[LISTING] = (body, b"") if isinstance(body, int) else (200, body.encode())
    with pytest.raises(getattr(faults, fault)):
        tracking.source().resolve(parse_repository("mlflow://runs/a1/out"))
