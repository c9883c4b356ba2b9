import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from builder_service.pipeline.build import build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress
from loramux_shared import faults
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.sources.checkpoint import describe_base, fetch_base
from loramux_shared.sources.https import Https
from loramux_shared.sources.local import LocalSource
from loramux_shared.sources.open import Sources
from loramux_shared.sources.public import AddressGuard
from loramux_shared.sources.remote_url import UrlSource
from loramux_shared.sources.retry import RetryPolicy
from loramux_shared.sources.secrets import Secrets
from loramux_shared.storage.memory import MemoryStore
from tests.contract.sources.test_source_secrets import (
    CANARY,
    PATIENCE,
    repo as opened_by_key,
    secrets_of,
    silence,
)
from tests.support.adapters import write_adapter, write_base
from tests.support.archive_files import pack
from tests.support.cases import cases
from tests.support.descriptors import cancel_after, count_open, expect_nothing_open, keep_fault
from tests.support.https_site import Site, body_of_length, redirect, serve_https

ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 999, "x/y": b"1"}
QUERY = "?sig=canary-of-a-query"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A server for files.test and inner.test whose authority SSL_CERT_FILE names."""
    with serve_https(tmp_path, "files.test", "inner.test", "127.0.0.1") as site:
        monkeypatch.setenv("SSL_CERT_FILE", str(site.ca_file))
        site.routes["/a.tar.gz"] = pack(ADAPTER)
        yield site


def https_of(allowed: tuple[str, ...]) -> Https:
    """Return a client for which every name is at this machine."""
    return Https(AddressGuard(allowed, lambda _host, _port: ["127.0.0.1"]))


def source(
    allowed: tuple[str, ...] = ("files.test",), patience: RetryPolicy | None = None, **secrets
) -> UrlSource:
    environment = {f"LORAMUX_SECRET_{name}": json.dumps(value) for name, value in secrets.items()}
    patience = patience or RetryPolicy(attempts=2, wait_s=0.01)
    return UrlSource(https_of(allowed), Secrets(None, environment), patience=patience)


def repo(site: Site, path: str = "/a.tar.gz", host: str = "files.test", **fields: str) -> Repository:
    return Repository(source=SourceKind.REMOTE_URL, repo=f"https://{host}:{site.port}{path}{QUERY}", **fields)


def test_an_archive_is_fetched_once(site, tmp_path):
    """A download gives the listing, the revision and every file; the query is sent and never printed."""
    url, counted = source(), []
    resolved = url.resolve(repo(site), counted.append)
    data = site.routes["/a.tar.gz"]
    assert resolved.repository.revision == hashlib.sha256(data).hexdigest()
    assert sum(counted) == len(data)
    assert {name: file.size for name, file in resolved.files.items()} == {k: len(v) for k, v in ADAPTER.items()}
    names = ["adapter_config.json", "adapter_model.safetensors"]
    fetched = url.fetch(resolved, names, tmp_path / "into")
    assert {path.name: path.read_bytes() for path in (tmp_path / "into").iterdir()} == {
        k: ADAPTER[k] for k in names
    }
    assert url.digests(resolved, names) == fetched
    assert url.pin(resolved, fetched) == resolved.repository
    assert site.requests == [(f"files.test:{site.port}", f"/a.tar.gz{QUERY}")]
    assert "canary" not in repr(resolved)


def test_a_revision_pins_the_archive(site):
    """A revision is the archive's sha256; another archive is REVISION_NOT_FOUND."""
    pinned = source().resolve(repo(site)).repository
    assert source().resolve(pinned).repository == pinned
    site.routes["/a.tar.gz"] = pack({"other": b""})
    with pytest.raises(faults.RevisionNotFound, match=f"expected an archive of sha256 {pinned.revision}"):
        source().resolve(pinned)


def test_a_subfolder_is_a_root_of_its_own(site):
    """Names with a subfolder are those inside it; one that does not exist is REPO_NOT_FOUND."""
    assert list(source().resolve(repo(site, subfolder="x")).files) == ["y"]
    with pytest.raises(faults.RepoNotFound, match="no folder 'z' in the archive"):
        source().resolve(repo(site, subfolder="z"))


@pytest.mark.parametrize("host", ["files.test", "127.0.0.1", "[::ffff:127.0.0.1]"])
def test_private_addresses_are_not_reached(site, host):
    """A name or number that leads to this machine is refused before a connection is made."""
    with pytest.raises(faults.SourceRefused, match="not a public address"):
        source(allowed=()).resolve(repo(site, host=host))
    assert site.names == []
    assert site.requests == []


@pytest.mark.parametrize(
    "to", ["https://inner.test:{port}/a.tar.gz", "https://127.0.0.1:{port}/a.tar.gz", "//[::1]:{port}/a.tar.gz"]
)
def test_redirects_are_checked(site, to):
    """A redirect of an allowed host to one that is not is refused, and not followed."""
    site.routes["/r"] = redirect(to.format(port=site.port))
    with pytest.raises(faults.SourceRefused, match="not a public address"):
        source().resolve(repo(site, "/r"))
    assert len(site.requests) == 1


@pytest.mark.parametrize(("to", "text"), cases(__file__, "REDIRECTS"))
def test_redirects_to_nowhere(site, to, text):
    """Redirects lead to https addresses, and end."""
    site.routes["/r"] = redirect(to, 307)
    with pytest.raises(faults.SourceRefused, match=text) as refusal:
        source().resolve(repo(site, "/r"))
    assert "canary" not in str(refusal.value)


def test_a_secret_goes_to_its_host_alone(site):
    """The authorization of a secret is sent to the host that the secret names, and not behind a redirect."""
    seen: list[tuple[str, str | None]] = []

    def query(handler) -> None:
        seen.append((handler.headers["Host"].partition(".")[0], handler.headers["Authorization"]))
        hosts = {1: "inner.test", 2: "files.test"}  # and back, as another host says
        redirect(f"https://{hosts[len(seen)]}:{site.port}/private" if len(seen) < 3 else "/a.tar.gz")(handler)

    site.routes["/private"] = query
    secret = {"host": "files.test", "authorization": "Bearer canary"}
    url = source(("files.test", "inner.test"), key=secret)
    expected = {"runtime_secret_name": "key"}
    url.resolve(repo(site, "/private", **expected))
    url.resolve(repo(site, "/private", host="inner.test", **expected))
    assert seen == [("files", "Bearer canary"), ("inner", None), ("files", None), ("inner", None)]
    with pytest.raises(
        faults.SourceRefused, match="secret 'key': expected a JSON object with host, authorization"
    ):
        source(key="canary").resolve(repo(site, **expected))


@pytest.mark.parametrize(("status", "fault"), cases(__file__, "STATUSES"))
def test_answers_have_their_reasons(site, status, fault):
    """A permanent failure is reported at once."""
    site.failures[:] = [status, status]
    with pytest.raises(getattr(faults, fault), match=f"{status}"):
        source().resolve(repo(site))
    assert len(site.requests) == 1


def test_a_busy_server_is_asked_again(site):
    """A status of 429 or 5xx is tried again; one that stays is SOURCE_UNAVAILABLE."""
    site.failures[:] = [429]
    source().resolve(repo(site))
    site.failures[:] = [503, 500]
    with pytest.raises(faults.SourceUnavailable, match="status 500"):
        source().resolve(repo(site))


def test_an_archive_that_breaks_off_is_asked_for_again(site):
    """A body shorter than announced is tried again from its beginning."""
    whole = pack(ADAPTER)
    broken = [body_of_length(len(whole), whole[:999])]
    site.routes["/b"] = lambda handler: (broken.pop() if broken else body_of_length(len(whole), whole))(handler)
    assert source().resolve(repo(site, "/b")).repository.revision == hashlib.sha256(whole).hexdigest()
    site.routes["/b"] = body_of_length(len(whole), whole[:999])
    with pytest.raises(faults.SourceUnavailable, match="found 999"):
        source().resolve(repo(site, "/b"))


def test_sizes_are_checked_before_and_while_reading(site):
    """The space for an archive is checked by its header, else by its bytes as they arrive."""
    site.routes["/huge"] = body_of_length(1 << 50, b"")
    site.routes["/large"] = body_of_length(1 << 30, b"")
    site.routes["/silent"] = lambda handler: handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + bytes(99 << 20))
    taken, received = [], []

    def room(size: int) -> None:
        taken.append(size)
        if sum(taken) > 5 << 20:
            raise faults.ResourcesExhausted("no room")

    with pytest.raises(faults.SourceRefused, match=r"an archive has at most 68719476736"):
        source().resolve(repo(site, "/huge"), received.append, room)
    assert taken == []
    with pytest.raises(faults.ResourcesExhausted, match="no room"):
        source().resolve(repo(site, "/large"), received.append, room)
    assert (taken, sum(received)) == ([1 << 30], 0)
    taken.clear()
    with pytest.raises(faults.ResourcesExhausted, match="no room"):
        source().resolve(repo(site, "/silent"), received.append, room)
    assert 4 << 20 < sum(received) <= 5 << 20


def test_a_server_that_drips_is_given_up(site):
    """A server that sends headers or a body byte by byte does not block a build for ever."""

    given_up = threading.Event()

    def drip(handler, first: bytes) -> None:
        handler.wfile.write(first)
        while not given_up.wait(0.05):
            handler.wfile.write(b"x")

    site.routes["/head"] = lambda handler: drip(handler, b"HTTP/1.1 200 OK\r\nX-Slow: ")
    site.routes["/body"] = lambda handler: drip(handler, b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    patience = RetryPolicy(attempts=2, wait_s=0.01, answer_s=0.3)
    try:
        for path in ("/head", "/body"):
            with pytest.raises(faults.SourceUnavailable):
                source(patience=patience).resolve(repo(site, path))
    finally:
        given_up.set()


def test_a_certificate_must_be_trusted(site, monkeypatch):
    """A certificate of another authority or for another name is refused with the cure."""
    with pytest.raises(faults.SourceRefused, match=r"certificate is not trusted.*SSL_CERT_FILE"):
        source(("other.test",)).resolve(repo(site, host="other.test"))
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(faults.SourceRefused, match="certificate is not trusted"):
        source().resolve(repo(site))


def test_a_base_is_recorded_and_fetched(site, tmp_path):
    """A base in an archive is described and fetched, and cached files are not downloaded again."""
    base = write_base(tmp_path / "base")
    site.routes["/base"] = pack({f"top/{path.name}": path.read_bytes() for path in base.iterdir()})
    sources = Sources({SourceKind.REMOTE_URL: source()})
    record = describe_base(sources, repo(site, "/base")).record
    folder = fetch_base(record, tmp_path / "cache", sources)
    assert (folder / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert fetch_base(record, tmp_path / "cache", sources) == folder
    assert len(site.requests) == 2


def test_nothing_stays_open(site, tmp_path):
    """Archives that were refused, cancelled, broken or used are closed, though failures are kept."""
    big = pack({"adapter_model.safetensors": bytes(4 << 20)}) + bytes(4 << 20)
    site.routes["/big"] = big
    site.routes["/evil"] = pack({**ADAPTER, "../../evil": b"x"})
    site.routes["/short"] = body_of_length(len(big) + 1, big)
    url, before = source(), count_open()
    with expect_nothing_open() as retained:
        for path in ("/evil", "/short", "/none", "/big"):
            keep_fault(lambda path=path: url.resolve(repo(site, path, revision="0" * 64)), retained)
        keep_fault(lambda: url.resolve(repo(site, "/big"), cancel_after(1 << 20)), retained)
        keep_fault(lambda: url.resolve(repo(site, subfolder="absent")), retained)
        used = url.resolve(repo(site))
        assert count_open()["files"] > before["files"]
        keep_fault(
            lambda: url.fetch(used, ["adapter_model.safetensors"], tmp_path / "i", cancel_after(9)), retained
        )
        used.close()
        gone = {"gone": FileDigest(size=1, sha256="0" * 64)}
        keep_fault(lambda: url.place(used.repository, gone, tmp_path / "cache"), retained)


@pytest.mark.parametrize("of_base", [True, False])
def test_a_build_does_not_download_more_than_it_may_write(site, tmp_path, of_base):
    """An archive above LORAMUX_MAX_BUILD_GB, of the base or an adapter, is refused without its bytes."""
    sent = []

    def large(handler) -> None:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
        while sum(sent) < 64 << 20:  # without a Content-Length: nobody knows before it comes
            sent.append(handler.wfile.write(bytes(1 << 20)))

    site.routes["/silent"] = large
    site.routes["/large"] = body_of_length(8 << 30, b"")
    base = {"source": "LOCAL", "repo": str(write_base(tmp_path / "base"))}
    sources = Sources({SourceKind.REMOTE_URL: source(), SourceKind.LOCAL: LocalSource([tmp_path])})
    context = BuildContext(MemoryStore(), sources, tmp_path / "work", max_build_bytes=10 << 20)
    for path in ("/large", "/silent"):
        archive = {"source": "REMOTE_URL", "repo": f"https://files.test:{site.port}{path}"}
        made = {"checkpoint_repository": archive if of_base else base}
        made["lora_adapters"] = {"one": base if of_base else archive}
        wish = parse_deployment({"model_name": "tiny", "build": made}).deployment
        with pytest.raises(faults.ResourcesExhausted, match=r"may write 10485760.*LORAMUX_MAX_BUILD_GB"):
            build(wish, context, Progress(["one"]))
    assert sum(sent) < 20 << 20


def url_source(secret: dict[str, str] | str = "", allowed: tuple[str, ...] = ("files.test",)) -> UrlSource:
    return UrlSource(https_of(allowed), secrets_of(secret), patience=PATIENCE)


def test_no_failure_holds_a_secret(caplog, site):
    """Queries, passwords and authorizations are in no failure of an address, its redirects or its archive."""
    bomb = pack({"/x": b""})
    routes: dict[str, bytes | Callable[[Any], None]] = {
        "/gone": redirect(f"https://files.test:{site.port}/absent?sig={CANARY}"),
        "/plain": redirect(f"http://files.test/x?sig={CANARY}"),
        "/user": redirect(f"https://u:{CANARY}@files.test/x"),
        "/away": redirect(f"https://files.test:9/x?sig={CANARY}"),
        "/inner": redirect(f"https://inner.test/x?sig={CANARY}"),
        "/short": body_of_length(99, b"x"),
        "/huge": body_of_length(1 << 60, b""),
        "/html": b"<html>",
        "/evil": bomb,
    }
    site.routes.update(routes)
    secret = {"host": "files.test", "authorization": f"Bearer {CANARY}"}
    for path in [*routes, "/absent", "/bad path", "/#"]:
        with silence(caplog):
            url_source(secret).resolve(
                opened_by_key("REMOTE_URL", f"https://files.test:{site.port}{path}?sig={CANARY}")
            )
    for address in (f"https://u:{CANARY}@files.test/x", f"http://files.test/x?{CANARY}", f"ftp://{CANARY}@x/y"):
        with silence(caplog):
            url_source(secret).resolve(opened_by_key("REMOTE_URL", address))
    for form in (CANARY, {"host": "files.test", "token": CANARY}):
        with silence(caplog):
            url_source(form).resolve(opened_by_key("REMOTE_URL", f"https://files.test:{site.port}/html"))
    with silence(caplog):
        url_source("", ()).resolve(
            opened_by_key("REMOTE_URL", f"https://files.test:{site.port}/html?{CANARY}", runtime_secret_name="")
        )


def test_no_generation_holds_a_secret(site, tmp_path):
    """The signature of an adapter's URL is in nothing that a build publishes."""
    adapter, store = write_adapter(tmp_path / "one"), MemoryStore()
    site.routes["/one"] = pack({path.name: path.read_bytes() for path in adapter.iterdir()})
    archive = {"source": "REMOTE_URL", "repo": repo(site, "/one").repo}
    base = {"source": "LOCAL", "repo": str(write_base(tmp_path / "base"))}
    data = {"model_name": "d", "build": {"checkpoint_repository": base, "lora_adapters": {"one": archive}}}
    sources = Sources({SourceKind.REMOTE_URL: source(), SourceKind.LOCAL: LocalSource([tmp_path])})
    build(parse_deployment(data).deployment, BuildContext(store, sources, tmp_path / "work"), Progress(["one"]))
    retained = "".join(store.get(key).decode() for key in store.list("deployments/"))
    assert archive["repo"].partition("?")[0] in retained
    assert "canary" not in retained


@pytest.mark.parametrize("revision", ["../../../evil", "..", "a\\..\\b"])
def test_a_recorded_revision_stays_in_the_cache(tmp_path, revision):
    """A generation that another client wrote does not lead the source out of its cache."""
    files = {"config.json": FileDigest(size=1, sha256="0" * 64)}
    expected = opened_by_key("REMOTE_URL", "https://files.test/a.tar.gz", revision=revision)
    with pytest.raises(faults.SourceRefused, match="not a path inside"):
        source().place(expected, files, tmp_path / "cache" / "deep" / "er")
    assert not (tmp_path / "cache").exists()
