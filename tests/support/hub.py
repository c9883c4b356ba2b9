"""A small Hugging Face hub in a thread, which answers the real client from memory."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.http_server import QuietHandler, serve_http

_INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/?]+))?")
_HISTORY = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<kind>refs|commits)(?:/(?P<revision>[^/?]+))?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class HubRepo:
    """A repository with one commit per revision name."""

    revisions: dict[str, str]
    """Commit by branch or tag, or by refs/pr/N."""
    files: dict[str, bytes]
    parents: dict[str, str] = field(default_factory=dict)
    """The commit before, by commit; the hub lists one on each page."""
    token: str = ""
    """The token that opens it; none is needed when empty."""
    gated: bool = False
    signature: str = ""
    """When set, files are behind a redirect to signed addresses of a storage, which always breaks off."""
    truncated: int = 0
    """Downloads whose body breaks off in the middle."""
    damaged: dict[str, int] = field(default_factory=dict)
    """How often each file is sent with a flipped bit."""
    listed: dict[str, Any] = field(default_factory=dict)
    """Replacement of the listing of every file."""
    lfs: tuple[str, ...] = ()
    """Files that the hub keeps as LFS objects."""


@dataclass
class Hub:
    """The hub's content, and what was asked."""

    endpoint: str = ""
    repos: dict[str, HubRepo] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path), in order."""
    failures: list[int] = field(default_factory=list)
    """Statuses to answer the next requests with, and to retry after a second."""
    sent_bytes: int = 0
    """Bytes of files that were sent."""

    def downloaded(self) -> list[str]:
        """The paths of files whose content was sent."""
        return [
            match["path"]
            for method, path in self.requests
            if method == "GET" and (match := _FILE.fullmatch(path))
        ]


@contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    with serve_http(server):
        yield hub


class _Handler(QuietHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:  # noqa: N802 - the base class's name
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        if self.hub.failures:
            self.answer(self.hub.failures.pop(0), b"", **{"Retry-After": "1"})
            return
        if path.startswith("/storage/"):
            self.answer(200, b"", **{"Content-Length": "1"})
            self.close_connection = True
            return
        match = _HISTORY.fullmatch(path) or _INFO.fullmatch(path) or _FILE.fullmatch(path)
        repo = self.hub.repos.get(match["repo"]) if match else None
        opened = repo and (not repo.token or self.headers.get("Authorization") == f"Bearer {repo.token}")
        if match is None or repo is None or not (opened or repo.gated):
            self._error(401, "RepoNotFound")
        elif not opened:
            self._error(403, "GatedRepo")
        else:
            self._content(repo, match)

    do_HEAD = do_GET  # noqa: N815 - the same

    def _content(self, repo: HubRepo, match: re.Match[str]) -> None:
        name = unquote(match["revision"] or "main")
        known = {*repo.revisions.values(), *repo.parents, *repo.parents.values()}
        commits = [each for each in known if len(name) > 6 and each.startswith(name)]
        commit = commits[0] if commits else repo.revisions.get(f"refs/{name}") or repo.revisions.get(name)
        kind, path = match.groupdict().get("kind"), match.groupdict().get("path")
        if commit is None:
            self._error(404, "RevisionNotFound")
        elif kind == "refs":
            refs = {name: tip for name, tip in repo.revisions.items() if not name.startswith("refs/pr/")}
            self._json({"branches": [{"targetCommit": tip} for tip in refs.values()], "tags": []})
        elif kind == "commits":
            older, at = repo.parents.get(commit), f"{self.hub.endpoint}/api/models/{match['repo']}/commits"
            headers = {"Link": f'<{at}/{older}>; rel="next"'} if older else {}
            self._json([{"id": commit}], **headers)
        elif path is None:
            body = {
                "id": match["repo"],
                "sha": commit,
                "siblings": [_sibling(repo, file) for file in repo.files],
            }
            self._json(body)
        elif path not in repo.files:
            self._error(404, "EntryNotFound")
        else:
            data = repo.files[path]
            if repo.signature:
                at = f"http://localhost:{urlsplit(self.hub.endpoint).port}/storage/{path}"
                headers = {"Location": f"{at}?X-Amz-Signature={repo.signature}", "X-Repo-Commit": commit}
                headers |= {"X-Linked-ETag": f'"{_sha(data)}"', "X-Linked-Size": str(len(data))}
                self.answer(302, b"", **headers)
                return
            headers = {"ETag": f'"{_sha(data)}"', "X-Repo-Commit": commit}
            if self.command == "GET" and repo.damaged.get(path, 0) > 0:
                repo.damaged[path] -= 1
                data = data[:-1] + bytes([data[-1] ^ 1])
            if self.command == "GET" and repo.truncated:
                repo.truncated -= 1
                headers["Content-Length"] = str(len(data))
                data, self.close_connection = data[: len(data) // 2], True
            if part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                data = data[int(part[1]) : int(part[2]) + 1]
            self.hub.sent_bytes += len(data) * (self.command == "GET")
            self.answer(206 if part else 200, data, **headers)

    def _json(self, body: Any, **headers: str) -> None:
        self.answer(200, json.dumps(body).encode(), **{"Content-Type": "application/json", **headers})

    def _error(self, status: int, code: str) -> None:
        self.answer(status, b"{}", **{"X-Error-Code": code})


def _sibling(repo: HubRepo, name: str) -> dict[str, Any]:
    data = repo.files[name]
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data)  # noqa: S324 - git's
    sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob.hexdigest()}
    if name in repo.lfs:
        sibling["lfs"] = {"size": len(data), "sha256": _sha(data), "pointerSize": 134}
    return sibling | repo.listed


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
