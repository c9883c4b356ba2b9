"""OCI: files of artifacts and images in a registry, over its API."""

import base64
import gzip
import json
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from loramux_shared.bundle.manifest import sha256_hex
from loramux_shared.deployment import Repository
from loramux_shared.faults import BundleCorrupt, Fault, RepoGated, RepoNotFound, SourceRefused
from loramux_shared.sources.https import Https
from loramux_shared.sources.oci import OciSource
from loramux_shared.sources.public import AddressGuard
from loramux_shared.sources.secrets import Secrets
from loramux_shared.spelling import parse_repository
from tests.contract.sources.test_source_secrets import PATIENCE
from tests.support.archive_files import member, pack, pack_members, zeros
from tests.support.descriptors import count_open
from tests.support.https_site import Route, Site, redirect, serve_https

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 99}
PASSWORD = "Basic " + base64.b64encode(b"ann:pw").decode()
OCI, MODEL, TITLE = "application/vnd.oci.image", "application/vnd.cncf.model", "org.opencontainers.image.title"


class Registry:
    """A registry with one repository, ``lab/a``."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.host = f"127.0.0.1:{site.port}"

    def _put(self, kind: str, data: bytes, name: str = "") -> dict[str, Any]:
        digest = f"sha256:{sha256_hex(data)}"
        for reference in filter(None, (digest, name)):
            self.site.routes[f"/v2/lab/a/{kind}/{reference}"] = data
        return {"digest": digest, "size": len(data)}

    def layer(self, data: bytes, kind: str, **notes: str) -> dict[str, Any]:
        """Store a layer, and return what a manifest says of it."""
        return self._put("blobs", data) | {"mediaType": kind, "annotations": notes}

    def tag(self, *layers: Any, tag: str = "v1", **fields: Any) -> str:
        """Store a manifest under a tag, and return its digest in hex."""
        body = json.dumps({"layers": layers} | fields).encode()
        return str(self._put("manifests", body, tag)["digest"]).removeprefix("sha256:")

    def files(self, names: str = TITLE, kind: str = f"{OCI}.layer.v1.tar") -> list[dict[str, Any]]:
        """Store the adapter's files as layers."""
        return [self.layer(data, kind, **{names: name}) for name, data in FILES.items()]

    def repository(self, reference: str = ":v1") -> Repository:
        return parse_repository(f"oci://{self.host}/lab/a{reference}")

    def source(self, auth: Mapping[str, str] | None = None) -> OciSource:
        """Return a source that may reach the registry, and has a password where one is given."""
        environment = {} if auth is None else {"DOCKER_AUTH_CONFIG": json.dumps({"auths": {self.host: auth}})}
        guard = AddressGuard((self.host, "localhost"))
        return OciSource(Https(guard), Secrets(None, environment), None, PATIENCE)

    def read(self, reference: str = ":v1", into: Path | None = None) -> tuple[str, dict[str, bytes]]:
        source = self.source()
        with closing(source.resolve(self.repository(reference))) as resolved:
            fetched = source.fetch(resolved, resolved.files, into)
            assert fetched == source.digests(resolved, resolved.files)
            revision = source.pin(resolved, fetched).revision
        return revision, {name: (into / name).read_bytes() for name in fetched}


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    with serve_https(tmp_path, "127.0.0.1", "localhost") as site:
        monkeypatch.setenv("SSL_CERT_FILE", str(site.ca_file))
        yield Registry(site)


def image(*members: tuple[str, bytes | None]) -> bytes:
    """Return a layer of an image; a member without content is a link."""
    headers = (
        (member(name, len(data or b""), tarfile.SYMTYPE if data is None else tarfile.REGTYPE), data or b"")
        for name, data in members
    )
    return gzip.decompress(pack_members(headers))


def as_artifact(registry: Registry) -> str:
    """A layer for each file, as ORAS pushes them."""
    return registry.tag(*registry.files())


def as_model(registry: Registry) -> str:
    """ModelPack: files and archives are weights or config of a model."""
    config, weights = registry.files("org.cncf.model.filepath", f"{MODEL}.weight.v1.raw")
    packed = image(("adapter_model.safetensors", FILES["adapter_model.safetensors"]))
    weights = registry.layer(packed, f"{MODEL}.weight.v1.tar", **{"org.cncf.model.filepath": "weights"})
    return registry.tag(config, weights)


def as_folder(registry: Registry) -> str:
    packed = pack({f"ad/{name}": data for name, data in FILES.items()})
    notes = {TITLE: "ad", "io.deis.oras.content.unpack": "true"}
    return registry.tag(registry.layer(packed, f"{OCI}.layer.v1.tar+gzip", **notes))


def as_modelcar(registry: Registry) -> str:
    """An image in an index: a system with links, and the model in layers that remove files."""
    system = image(("bin/sh", None), ("etc/motd", b""), ("models/old/x", b"1"), ("./models/gone.json", b"2"))
    first, second = FILES.items()
    layers = [
        system,
        image((f"models/{first[0]}", b"older"), ("models/.wh.old", b"")),
        image(
            (f"models/{first[0]}", first[1]), (f"models/{second[0]}", second[1]), ("models/.wh.gone.json", b"")
        ),
    ]
    digest = registry.tag(*(registry.layer(data, f"{OCI}.layer.v1.tar") for data in layers), tag="")
    index = [{"digest": f"sha256:{digest}", "platform": {"architecture": "arm64"}}]
    return registry.tag(manifests=index, mediaType=f"{OCI}.index.v1+json")


@pytest.mark.parametrize("made", [as_artifact, as_model, as_folder, as_modelcar])
def test_the_files_of_every_form_are_read(registry: Registry, tmp_path: Path, made: Any) -> None:
    """The digest of what the tag names is the revision, and pins the content when the tag moves."""
    digest = made(registry)
    assert registry.read(into=tmp_path / "tag") == (digest, FILES)
    moved = registry.tag(registry.layer(b"other", "text", **{TITLE: "other"}))
    assert registry.read(into=tmp_path / "moved") == (moved, {"other": b"other"})
    assert registry.read(f"@sha256:{digest}", tmp_path / "pinned") == (digest, FILES)
    pinned = registry.repository().model_copy(update={"revision": digest})
    with closing(registry.source().resolve(pinned)) as resolved:
        files = registry.source().digests(resolved, resolved.files)
    folder = registry.source().place(pinned, files, tmp_path / "cache")
    assert {name: (folder / name).read_bytes() for name in files} == FILES


def guarded(body: bytes, password: str, challenge: str) -> Route:
    """A route that wants a header, and says how to get one."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        allowed = handler.headers.get("Authorization") == password
        handler.send_response(200 if allowed else 401)
        if not allowed:
            handler.send_header("WWW-Authenticate", challenge)
        handler.send_header("Content-Length", str(len(body) if allowed else 0))
        handler.end_headers()
        handler.wfile.write(body if allowed else b"")

    return answer


@pytest.mark.parametrize("bearer", [False, True])
def test_a_password_of_dockers_config_opens_a_registry(registry: Registry, bearer: bool) -> None:
    """The registry's realm gets it for a token; other passwords, and none, are refused by name."""
    registry.tag(*registry.files())
    realm = f'Bearer realm="https://{registry.host}/token",service="r",scope="repository:lab/a:pull"'
    routes = registry.site.routes
    for path, body in list(routes.items()):
        assert isinstance(body, bytes)
        routes[path] = guarded(body, "Bearer t", realm) if bearer else guarded(body, PASSWORD, "Basic realm=r")
    routes["/token"] = guarded(b'{"token": "t"}', PASSWORD, "Basic realm=r")
    for auth in ({"username": "ann", "password": "pw"}, {"auth": PASSWORD.removeprefix("Basic ")}):
        assert registry.source(auth).resolve(registry.repository()).files.keys() == FILES.keys()
    for wrong in (None, {"username": "ann", "password": "other"}):
        with pytest.raises(RepoGated) as caught:
            registry.source(wrong).resolve(registry.repository())
        assert "password" in caught.value.message
        assert "other" not in caught.value.message
    with pytest.raises(SourceRefused, match="expected docker's config"):
        registry.source({"username": "ann"}).resolve(registry.repository())


def test_a_password_goes_to_no_realm_behind_a_redirect(registry: Registry) -> None:
    """The challenge of another host than the registry's is a refusal, and no token is fetched."""
    away, routes = f"https://localhost:{registry.site.port}", registry.site.routes
    routes |= {"/v2/lab/a/manifests/v1": redirect(f"{away}/a"), "/token": b'{"token": "t"}'}
    routes["/a"] = guarded(b"{}", "Bearer t", f'Bearer realm="{away}/token"')
    with pytest.raises(RepoGated, match="localhost"):
        registry.source({"username": "ann", "password": "pw"}).resolve(registry.repository())
    assert [path for _, path in registry.site.requests] == ["/v2/lab/a/manifests/v1", "/a"]


@pytest.mark.parametrize("token", [b'{"token": "a\\nb"}', b"x" * (5 << 20)])
def test_a_token_that_is_none_is_refused(registry: Registry, token: bytes) -> None:
    """A token is bounded, and has the characters of a header."""
    challenge = f'Bearer realm="https://{registry.host}/token"'
    registry.site.routes |= {"/v2/lab/a/manifests/v1": guarded(b"{}", "Bearer t", challenge), "/token": token}
    with pytest.raises(SourceRefused, match=r"authorizes|more than"):
        registry.source().resolve(registry.repository())


def mislabelled(registry: Registry) -> Any:
    layer = registry.layer(b"content", "text", **{TITLE: "a"})
    registry.site.routes[f"/v2/lab/a/blobs/{layer['digest']}"] = b"another"
    return layer


@pytest.mark.parametrize(
    ("layers", "fault"),
    [
        (lambda _: {}, SourceRefused),
        (lambda _: {"digest": "md5:1", "size": 1}, SourceRefused),
        (lambda _: {"digest": f"sha256:{'0' * 64}", "size": float("inf")}, SourceRefused),
        (lambda made: made.layer(b"1", "text", **{TITLE: "../a"}), SourceRefused),
        (lambda made: made.layer(b"1", f"{OCI}.layer.v1.tar+zstd"), SourceRefused),
        (lambda made: made.layer(image(("models/../../a", b"1")), f"{OCI}.layer.v1.tar"), SourceRefused),
        (lambda made: made.layer(image(("models/a", None)), f"{OCI}.layer.v1.tar"), SourceRefused),
        (lambda made: made.layer(image(("etc/motd", b"1")), f"{OCI}.layer.v1.tar"), RepoNotFound),
        (mislabelled, BundleCorrupt),
    ],
)
def test_hostile_artifacts_are_refused(
    registry: Registry, tmp_path: Path, layers: Any, fault: type[Fault]
) -> None:
    """A manifest cannot lead outside, nor have another content than its digests say."""
    registry.tag(layers(registry))
    with pytest.raises(fault):
        registry.read(into=tmp_path)


@pytest.mark.parametrize(
    "body", [b"[]", b"{", b'{"manifests": []}', b'{"manifests": [{"annotations": 1}]}', b"{}"]
)
def test_what_is_no_manifest_is_refused(registry: Registry, body: bytes) -> None:
    """A registry's answer is untrusted."""
    registry.site.routes["/v2/lab/a/manifests/latest"] = body
    with pytest.raises(SourceRefused, match="OCI oci://"):
        registry.source().resolve(registry.repository(""))


def test_addresses_and_digests_are_checked(registry: Registry) -> None:
    """A manifest that is not the pinned one is refused, as is an address without a name."""
    registry.site.routes[f"/v2/lab/a/manifests/sha256:{'0' * 64}"] = b'{"layers": []}'
    with pytest.raises(BundleCorrupt):
        registry.source().resolve(registry.repository(f"@sha256:{'0' * 64}"))
    with pytest.raises(RepoNotFound, match="no v9"):
        registry.source().resolve(registry.repository(":v9"))
    with pytest.raises(SourceRefused, match="expected oci://HOST"):
        registry.source().resolve(parse_repository("oci://host"))


def test_a_layer_that_is_listed_again_is_unpacked_once(registry: Registry) -> None:
    """A manifest that lists one layer twenty times is read as quickly as one that lists it once."""
    layer = registry.layer(
        pack({f"models/{name}": data for name, data in FILES.items()}), f"{OCI}.layer.v1.tar+gzip"
    )
    pieces: dict[int, int] = {}
    for times in (1, 20):
        registry.tag(*[layer] * times)
        calls: list[int] = []
        with closing(registry.source().resolve(registry.repository(), calls.append)) as resolved:
            assert set(resolved.files) == set(FILES)
        pieces[times] = sum(count == 0 for count in calls)
    assert pieces[20] == pieces[1] > 0


def test_all_layers_together_unpack_to_so_much(registry: Registry) -> None:
    """Each of several layers may unpack to its part of what one may: together they are no larger bomb."""
    bomb = gzip.compress(member("models/x", 40 << 20).tobuf(), 1) + zeros(40 << 20)
    layers = [registry.layer(bomb, f"{OCI}.layer.v1.tar+gzip")]
    layers += [registry.layer(pack({f"models/{n}": b"x"}), f"{OCI}.layer.v1.tar+gzip") for n in range(30)]
    registry.tag(*layers)
    with pytest.raises(SourceRefused, match=f"unpacks to more than {(1 << 30) // 31} bytes"):
        registry.source().resolve(registry.repository())


def test_layers_share_one_open_file(registry: Registry, tmp_path: Path) -> None:
    """An artifact of fifty archives holds one file open, and each is read from its place there."""
    layers = [
        registry.layer(pack({f"models/{n}": str(n).encode() * n}), f"{OCI}.layer.v1.tar+gzip")
        for n in range(50)
    ]
    registry.tag(*layers)
    before = count_open()["files"]
    source = registry.source()
    with closing(source.resolve(registry.repository())) as resolved:
        assert count_open()["files"] <= before + 1
        source.fetch(resolved, resolved.files, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.glob("[0-9]*")} == {
        str(n): str(n) * n for n in range(50)
    }


def test_whiteouts_are_looked_up(registry: Registry) -> None:
    """Thousands of whiteouts over thousands of files name files, folders, and all that a folder had."""
    names = [f"models/{n % 90}/{n}" for n in range(9000)]
    system = image(*((name, b"") for name in names), ("models/kept/x", b""), ("models/emptied/x", b""))
    gone = [f"models/{n % 90}/.wh.{n}" for n in range(4500)] + [f"models/.wh.{n}" for n in range(45, 90)]
    above = image(
        *((name, b"") for name in (*gone, "models/emptied/.wh..wh..opq", "models/emptied/new")),
        ("models/7/7", b"again"),
    )
    registry.tag(*(registry.layer(data, f"{OCI}.layer.v1.tar") for data in (system, above)))
    with closing(registry.source().resolve(registry.repository())) as resolved:
        found = set(resolved.files)
    kept = {f"{n % 90}/{n}" for n in range(4500, 9000) if n % 90 < 45}
    assert found == kept | {"kept/x", "emptied/new", "7/7"}
    assert resolved.files["7/7"].size == 5
