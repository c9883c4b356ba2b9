"""HF: repositories of a Hugging Face hub, at a commit."""

import errno
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

from huggingface_hub import HfApi, get_session, hf_hub_download, hf_raise_for_status
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.hf_api import RepoSibling
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from loramux_shared.bases.files import gguf_files
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.deployment import PULL_REQUESTS, Repository
from loramux_shared.faults import (
    BundleCorrupt,
    Fault,
    RepoGated,
    RepoNotFound,
    RevisionNotFound,
    SourceRefused,
    SourceUnavailable,
)
from loramux_shared.sources.base import Progress, Resolved, Room, SourceFile, bounded, unwatched
from loramux_shared.sources.cache import missing_files
from loramux_shared.sources.files import (
    checked_file,
    disk_errors,
    disk_fault,
    hash_pieces,
    inside,
    is_text,
    scratch,
    whole,
)
from loramux_shared.sources.hub_gguf import GgufListing, folder_of, list_gguf, name_in, names_file
from loramux_shared.sources.retry import Busy, RetryPolicy, TimeLeft
from loramux_shared.sources.secrets import Secrets, warn_unset

TOKEN_VARIABLE: Final = "HF_TOKEN"  # noqa: S105 - the variable's name
TIMEOUT_S: Final = 20.0
COMMIT: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
MAX_PAGES: Final = 40
"""Most pages of commits that are read, of all branches and tags; the hub's have 50 commits or more."""
PARTIAL: Final = 206
"""HTTP's status of a part of a file."""
SLACK: Final = 16 << 20
"""Bytes that a client may count beyond a file's; it reads in pieces, and continues where it broke off."""
# The class of every failure of the hub's HTTP client, which is httpx or httpx2 by its version.
_HTTP_ERROR: Final[type[BaseException]] = HfHubHTTPError.__mro__[1]

# Both log whole addresses, with the signatures of the storage that the hub leads to.
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
logging.getLogger(_HTTP_ERROR.__module__.partition(".")[0]).setLevel(logging.WARNING)

_T = TypeVar("_T")


class HubSource:
    """Resolves a repository to a commit first, and fetches files by their literal names at that commit."""

    def __init__(
        self,
        secrets: Secrets,
        *,
        endpoint: str | None = None,
        work_dir: Path | None = None,
        patience: RetryPolicy | None = None,
    ) -> None:
        self._secrets = secrets
        self._work_dir = work_dir
        self._endpoint = endpoint
        self._patience = patience or RetryPolicy()

    def resolve(
        self, repository: Repository, progress: Progress = unwatched, room: Room = unwatched
    ) -> Resolved:
        """List a repository's files with their sizes at the commit that its revision names."""
        del room
        api = HfApi(endpoint=self._endpoint, token=self._token(repository))
        folder = folder_of(repository)
        prefix = f"{folder}/" if folder else ""

        def listing(watch: Progress) -> tuple[str, dict[str, SourceFile]]:
            info = api.model_info(
                repository.repo, revision=repository.revision or None, files_metadata=True, timeout=TIMEOUT_S
            )
            if not info.sha or not COMMIT.fullmatch(info.sha):
                raise SourceUnavailable(
                    f"HF {repository.repo}: expected a commit from the hub, found {info.sha!r}"
                )
            if repository.branches_only and repository.revision:
                address = f"{api.endpoint}/api/models/{repository.repo}"
                if not is_taken(address, info.sha, self._token(repository), TIMEOUT_S, watch):
                    raise _of_nobody(repository, info.sha)
            files = {
                item.rfilename.removeprefix(prefix): _listed(item)
                for item in info.siblings or ()
                if item.rfilename.startswith(prefix) and is_text(item.rfilename)
            }
            return info.sha, files

        commit, files = self._call(repository, listing, progress)
        if prefix and not files:
            raise RepoNotFound(f"HF {repository.repo}: no folder {folder!r} at {commit}")
        at = repository.model_copy(update={"revision": commit, "branches_only": False})
        if not names_file(repository):
            return Resolved(at, files)
        address = f"{api.endpoint}/{at.repo}/resolve/{commit}/{quote(prefix)}"
        return list_gguf(at, files, lambda *part: self._range(at, address, part, progress))

    def fetch(
        self, resolved: Resolved, names: Iterable[str], into: Path, progress: Progress = unwatched
    ) -> dict[str, FileDigest]:
        """Download files, and hash what arrived."""
        names = bounded(resolved, names, f"HF {resolved.repository.repo}")
        return {name: self._fetched(resolved, name, into, progress) for name in names}

    def shapes(self, resolved: Resolved, name: str) -> dict[str, tuple[int, ...]] | None:
        """Return the shapes of a file's tensors by key, from its header alone; None for no safetensors file."""
        repository = resolved.repository
        api = HfApi(endpoint=self._endpoint, token=self._token(repository))
        path = "/".join(part for part in (repository.subfolder, name) if part)

        def header(_: Progress) -> dict[str, tuple[int, ...]]:
            found = api.parse_safetensors_file_metadata(
                repository.repo, path, revision=repository.revision, timeout=TIMEOUT_S
            )
            return {key: tuple(tensor.shape) for key, tensor in found.tensors.items()}

        try:
            return self._call(repository, header, unwatched)
        except SafetensorsParsingError:
            return None

    def digests(
        self, resolved: Resolved, names: Iterable[str], progress: Progress = unwatched, room: Room = unwatched
    ) -> dict[str, FileDigest]:
        """Take the digests that the hub knows, and download the other files to hash them."""
        known, unknown = {}, []
        for name in names:
            file = resolved.files[name]
            if file.sha256:
                known[name] = FileDigest(size=file.size, sha256=file.sha256)
            else:
                unknown.append(name)
        room(resolved.size(unknown))
        with scratch(self._work_dir) as folder:
            return known | self.fetch(resolved, unknown, folder, progress)

    def pin(self, resolved: Resolved, files: Mapping[str, FileDigest]) -> Repository:
        """Return the repository at its commit."""
        del files
        return resolved.repository

    def place(
        self,
        repository: Repository,
        files: Mapping[str, FileDigest],
        cache: Path,
        progress: Progress = unwatched,
        room: Room = unwatched,
    ) -> Path:
        """Download what the cache lacks, at the recorded commit."""
        folder = inside(cache, f"hub/{repository.repo.replace('/', '--')}/{repository.revision}")
        at = folder / repository.subfolder
        if names_file(repository):
            at = at.with_name(f"{at.name}.files")
        missing = missing_files(cache, at, files)
        small = self._small_files(repository, missing, progress)
        for name in missing:
            room(files[name].size)
            if name in small:
                with disk_errors(), whole(at / name) as sink:
                    sink.write(small[name])
                continue
            path = self._download(repository, name, files[name].size, folder, progress)
            if path != at / name:
                with disk_errors():
                    at.mkdir(parents=True, exist_ok=True)
                    path.replace(at / name)
        return at

    def _small_files(
        self, repository: Repository, missing: list[str], progress: Progress
    ) -> Mapping[str, bytes]:
        """Return the contents of the files that follow from a file of GGUF, where some are missing."""
        if not names_file(repository) or set(missing) <= {*gguf_files(missing)}:
            return {}
        resolved = self.resolve(repository, progress)
        return resolved.small if isinstance(resolved, GgufListing) else {}

    def _range(
        self, repository: Repository, address: str, part: tuple[str, int, int], progress: Progress
    ) -> bytes:
        """Return a part of a file in a folder at an address: a name, where it begins, and its bytes."""
        name, begin, count = part
        token = self._token(repository)
        headers = {"authorization": f"Bearer {token}"} if token else {}
        headers |= {"Range": f"bytes={begin}-{begin + count - 1}", "Accept-Encoding": "identity"}

        def ask(watch: Progress) -> bytes:
            data = b""
            with get_session().stream(
                "GET", f"{address}{quote(name)}", headers=headers, timeout=TIMEOUT_S
            ) as answer:
                if answer.status_code != PARTIAL:
                    answer.read()
                    hf_raise_for_status(answer)
                    raise ValueError  # a whole file
                for piece in answer.iter_bytes():
                    watch(len(piece))
                    data += piece
                    if len(data) > count:
                        raise ValueError
            if len(data) < count:
                raise OSError
            return data

        return self._call(repository, ask, progress)

    def _fetched(self, resolved: Resolved, name: str, into: Path, progress: Progress) -> FileDigest:
        """Download a file, once more where it is not what was listed, and return what it is."""
        target, file = inside(into, name), resolved.files[name]
        if isinstance(resolved, GgufListing) and name in resolved.small:
            with whole(target) as sink:
                return hash_pieces([resolved.small[name]], progress, sink)
        problem = ""
        for _ in range(2):
            path = self._download(resolved.repository, name, file.size, into, progress)
            with disk_errors():
                target.parent.mkdir(parents=True, exist_ok=True)
                found, problem = checked_file(path.replace(target), file)
            if not problem:
                return found
            target.unlink()
        raise BundleCorrupt(
            f"HF {resolved.repository.repo}: {name}: twice not what the hub lists: {problem}. "
            "Build again; if it stays, upload the file again."
        )

    def _download(self, repository: Repository, name: str, size: int, into: Path, progress: Progress) -> Path:
        """Write one file to ``into/<subfolder>/<name>``, one of GGUF where it is in the repository."""
        path = self._call(
            repository,
            lambda watch: hf_hub_download(
                repository.repo,
                name_in(repository, name),
                subfolder=folder_of(repository) or None,
                revision=repository.revision,
                local_dir=into,
                token=self._token(repository),
                endpoint=self._endpoint,
                tqdm_class=_meter(_at_most(size, f"HF {repository.repo}: {name}", watch)),
            ),
            progress,
        )
        return Path(path)

    def _token(self, repository: Repository) -> str | bool:
        name = repository.runtime_secret_name
        token = self._secrets.get(name, default_variable=TOKEN_VARIABLE)
        if name and token is None:
            warn_unset(repository)
        return token or False  # False: never the token of the user who is logged in on this machine

    def _call(self, repository: Repository, call: Callable[[Progress], _T], progress: Progress) -> _T:
        hint = self._secrets.hint(repository.runtime_secret_name, default_variable=TOKEN_VARIABLE)

        def attempt(deadline: TimeLeft) -> _T:
            watch = deadline.watch(f"HF {repository.repo}", progress)
            with _translated(repository, hint):
                return call(watch)

        return self._patience.call(attempt, progress)


@contextmanager
def _translated(repository: Repository, hint: str) -> Iterator[None]:
    """Turn the failures of the hub's client into ours; their texts hold addresses, and are not repeated."""
    repo, revision = f"HF {repository.repo}", repository.revision or "main"
    try:
        yield
    except GatedRepoError:  # before the class that is its base
        raise RepoGated(
            f"{repo}: gated; the licence was not accepted, or the token lacks access. {hint}"
        ) from None
    except RepositoryNotFoundError:
        raise RepoNotFound(f"{repo}: does not exist, or is private for this token. {hint}") from None
    except RevisionNotFoundError:
        raise RevisionNotFound(f"{repo}: no revision {revision!r}") from None
    except DisabledRepoError:
        raise RepoGated(f"{repo}: disabled by the hub") from None
    except HFValidationError:
        raise RepoNotFound(f"{repo}: not a valid repository id; expected 'namespace/name'") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise SourceUnavailable(f"{repo}: the hub cannot be reached ({type(error).__name__})") from None
    except EntryNotFoundError:
        raise RepoNotFound(f"{repo}: a file is missing at revision {revision!r}") from None
    except HfHubHTTPError as error:
        raise _by_status(repo, error.response, hint) from None
    except _HTTP_ERROR as error:
        raise SourceUnavailable(f"{repo}: the hub does not answer ({type(error).__name__})") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(repo, error) from None


def _broken(repo: str, error: Exception) -> Fault:
    """Return the fault for a full disk, a short answer, or an answer in another form than the hub's."""
    if not isinstance(error, OSError):
        return SourceUnavailable(f"{repo}: the hub's answer cannot be read ({type(error).__name__})")
    if error.filename is not None or error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return disk_fault(error)
    return SourceUnavailable(f"{repo}: {error.strerror or 'the transfer was not complete'}")


def _of_nobody(repository: Repository, commit: str) -> SourceRefused:
    return SourceRefused(
        f"HF {repository.repo}: expected a branch or tag, or a commit of one, found {repository.revision!r}: "
        f"commit {commit[:12]}, as of a pull request, which any user may open. Name a branch or tag, or have "
        f"hf:{repository.repo}@{PULL_REQUESTS}* allowed."
    )


def _by_status(repo: str, response: Any, hint: str) -> RepoNotFound | RepoGated | SourceUnavailable:
    status = response.status_code
    if status in {401, 403}:
        return RepoGated(f"{repo}: the hub refuses this token ({status}). {hint}")
    if status == 404:
        return RepoNotFound(f"{repo}: does not exist, or is private for this token. {hint}")
    return Busy.until(f"{repo}: the hub answers with status {status}", response.headers.get("Retry-After"))


def _listed(item: RepoSibling) -> SourceFile:
    """Return what a listing says of a file: of one in LFS its sha256, of another one git's own digest.

    Raises:
        ValueError, TypeError: that is no size, or no digest.
    """
    size, known = item.size or 0, item.lfs.sha256 if item.lfs else None
    if size < 0 or (known is not None and not _SHA256.fullmatch(known)):
        raise ValueError
    plain = item.lfs is None and item.blob_id is not None and COMMIT.fullmatch(item.blob_id)
    return SourceFile(size, known, f"git:{item.blob_id}" if plain else "")


def _at_most(size: int, name: str, progress: Progress) -> Progress:
    """Return a progress that ends a transfer of much more than was listed; begun again, it counts twice."""
    left = 2 * size + SLACK

    def counted(count: int) -> None:
        nonlocal left
        left -= count
        if left < 0:
            raise SourceRefused(f"{name}: expected {size} bytes, found far more")
        progress(count)

    return counted


def _meter(progress: Progress) -> type[Any]:
    """Return a silent progress bar that reports the bytes."""

    class Meter(tqdm):  # type: ignore[misc,type-arg,unused-ignore]  # tqdm has no types
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            progress(int(n or 0))
            return None

    return Meter


def is_taken(address: str, commit: str, token: str | bool, timeout_s: float, progress: Progress) -> bool:
    """Return True where a branch or tag of a repository, at the hub's API, has a commit in its history.

    Any user may open a pull request, and the hub serves the commits of one by their hashes as well as by
    refs/pr/N.
    """
    headers = {"authorization": f"Bearer {token}"} if token else {}

    def ask(page: str) -> Any:
        progress(0)
        answer = get_session().get(page, headers=headers, timeout=timeout_s)
        hf_raise_for_status(answer)
        return answer

    refs = ask(f"{address}/refs").json()
    tips = dict.fromkeys(ref["targetCommit"] for kind in ("branches", "tags") for ref in refs[kind])
    if commit in tips:
        return True
    hub = address.partition("api/")[0]
    pages = [f"{address}/commits/{tip}" for tip in reversed(tips)]
    for _ in range(MAX_PAGES):
        if not pages:
            break
        answer = ask(pages.pop())
        if any(each["id"] == commit for each in answer.json()):
            return True
        older = answer.links.get("next", {}).get("url", "")
        if older.startswith(hub):  # the token goes nowhere else
            pages.append(older)
    return False
