import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import file_download
from structlog.testing import capture_logs

from loramux_shared import faults
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.sources.checkpoint import describe_base, fetch_base
from loramux_shared.sources.hub import MAX_PAGES, HubSource
from loramux_shared.sources.local import LocalSource
from loramux_shared.sources.open import Sources
from loramux_shared.sources.retry import RetryPolicy
from loramux_shared.sources.secrets import Secrets
from tests.fuzz.ggufs import PARTS, GgufParts
from tests.support.adapters import write_adapter, write_base
from tests.support.descriptors import cancel_after, expect_nothing_open, keep_fault
from tests.support.hub import Hub, HubRepo, serve_hub

COMMIT, OLD = "c" * 40, "0" * 40
FILES = ("adapter_config.json", "adapter_model.safetensors")
TOKEN = "hf_not_a_real_one"  # noqa: S105 - of the small hub


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(tmp_path) -> Iterator[Hub]:
    """A hub with an adapter, a base, a gated and a private repository."""
    adapter = content(write_adapter(tmp_path / "adapter"))
    below = {f"checkpoint-5/{name}": data for name, data in adapter.items()}
    revisions = {"main": COMMIT, "v1": OLD}
    with serve_hub() as hub:
        hub.repos["org/adapter"] = HubRepo(revisions, {**adapter, **below, "optimizer.pt": bytes(9)})
        base = content(write_base(tmp_path / "base"))
        hub.repos["org/base"] = HubRepo(revisions, base, lfs=("model.safetensors",))
        hub.repos["org/gated"] = HubRepo(revisions, adapter, token=TOKEN, gated=True)
        hub.repos["org/private"] = HubRepo(revisions, adapter, token=TOKEN)
        yield hub


def source(hub: Hub, **environment: str) -> HubSource:
    """The real client against the small hub, with these variables set."""
    return HubSource(
        Secrets(None, environment), endpoint=hub.endpoint, patience=RetryPolicy(attempts=2, wait_s=0.01)
    )


def repo(name: str, **fields: str) -> Repository:
    return Repository(source=SourceKind.HF, repo=name, **fields)


def test_a_subfolder_is_a_root_of_its_own(hub, tmp_path):
    """Names and files with a subfolder are those inside it."""
    hf = source(hub)
    resolved = hf.resolve(repo("org/adapter", subfolder="checkpoint-5"))
    assert sorted(resolved.files) == sorted(FILES)
    hf.fetch(resolved, FILES, tmp_path / "into")
    assert (tmp_path / "into" / FILES[0]).is_file()
    assert sorted(hub.downloaded()) == sorted(f"checkpoint-5/{name}" for name in FILES)
    with pytest.raises(faults.RepoNotFound, match="no folder 'nowhere'"):
        hf.resolve(repo("org/adapter", subfolder="nowhere"))


STRANGE, MERGED, FIRST = "9" * 40, "5" * 40, "1" * 40


@pytest.fixture
def contested(hub: Hub) -> HubSource:
    """The repository has an open pull request, one that was merged, and a branch that looks like one."""
    org = hub.repos["org/adapter"]
    org.revisions = {"main": COMMIT, "v1": OLD, "pr/3": OLD, "refs/pr/1": STRANGE, "refs/pr/2": MERGED}
    org.parents = {COMMIT: MERGED, MERGED: FIRST, STRANGE: COMMIT}
    return source(hub)


@pytest.mark.parametrize("revision", ["", "main", "v1", "pr/3", COMMIT, OLD, MERGED, FIRST, "refs/pr/2"])
def test_commits_of_branches_are_taken(contested: HubSource, revision: str) -> None:
    """The histories of branches and tags count, and with them a pull request that was merged."""
    plain = repo("org/adapter", revision=revision)
    found = contested.resolve(plain.model_copy(update={"branches_only": True}))
    assert found.repository == contested.resolve(plain).repository


@pytest.mark.parametrize("revision", ["refs/pr/1", "pr/1", STRANGE, STRANGE[:7]])
def test_commits_of_pull_requests_are_refused(contested: HubSource, revision: str) -> None:
    """Whatever name of the commit the hub takes; where pull requests are wanted they are served."""
    requested = repo("org/adapter", revision=revision)
    assert contested.resolve(requested).repository.revision == STRANGE
    with pytest.raises(faults.SourceRefused, match="pull request, which any user may open"):
        contested.resolve(requested.model_copy(update={"branches_only": True}))


def test_a_long_history_is_not_read_to_its_end(contested: HubSource, hub: Hub) -> None:
    """A commit beyond the pages that are read is refused, as one of nobody."""
    parents = hub.repos["org/adapter"].parents
    parents |= {f"{number:040x}": f"{number + 1:040x}" for number in range(100)} | {FIRST: f"{0:040x}"}
    with pytest.raises(faults.SourceRefused):
        contested.resolve(
            repo("org/adapter", revision=f"{100:040x}").model_copy(update={"branches_only": True})
        )
    assert sum("/commits/" in path for _, path in hub.requests) == MAX_PAGES


@pytest.mark.parametrize(
    ("expected", "fault", "text"),
    [
        (
            repo("org/nowhere"),
            faults.RepoNotFound,
            "does not exist, or is private for this token. Set HF_TOKEN",
        ),
        (repo("org/private"), faults.RepoNotFound, "does not exist, or is private for this token"),
        (repo("org/gated"), faults.RepoGated, "gated; the licence was not accepted"),
        (repo("org/adapter", revision="v9"), faults.RevisionNotFound, "no revision 'v9'"),
        (repo("not--a/valid..id"), faults.RepoNotFound, "not a valid repository id"),
    ],
)
def test_answers_have_their_reasons(hub, expected, fault, text):
    """A refusal of the hub becomes the failure of that name, with its cure."""
    with pytest.raises(fault, match=text.replace(".", r"\.")):
        source(hub).resolve(expected)


@pytest.mark.parametrize(
    ("content", "fault", "text"),
    [
        (None, faults.RepoNotFound, "a file is missing"),
        (bytes(40 << 20), faults.SourceRefused, "found far more"),
    ],
    ids=["gone", "grown"],
)
def test_a_file_that_changed_since_the_listing_is_refused(hub, tmp_path, content, fault, text):
    """A file that vanished is REPO_NOT_FOUND, and a download of far more than the listing said is ended."""
    hf = source(hub)
    resolved = hf.resolve(repo("org/adapter"))
    files = hub.repos["org/adapter"].files
    del files[FILES[1]]
    if content is not None:
        files[FILES[1]] = content
    with pytest.raises(fault, match=text):
        hf.fetch(resolved, FILES, tmp_path)


@pytest.mark.parametrize(
    ("name", "environment"),
    [("", {"HF_TOKEN": TOKEN}), ("hf_access_token", {"LORAMUX_SECRET_hf_access_token": TOKEN})],
)
def test_the_token_opens_what_it_may(hub, name, environment):
    """The token is HF_TOKEN, or the secret that the repository names."""
    expected = repo("org/gated", runtime_secret_name=name)
    assert source(hub, **environment).resolve(expected).repository.revision == COMMIT


def test_a_secret_of_a_file_comes_first(hub, tmp_path):
    """A file of the secrets folder is read before the variable, and its name must be a plain one."""
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    secrets = Secrets(tmp_path, {"LORAMUX_SECRET_token": "other"})
    assert secrets.get("token") == TOKEN
    assert secrets.get("absent") is None
    for name in ("../token", ".token", "a/b", "a\n"):
        with pytest.raises(faults.SourceRefused, match="plain name"):
            secrets.get(name)


def test_a_secret_that_is_not_set_is_reported(hub):
    """Public repositories open without the named secret, and a refusal says where it was looked for."""
    with capture_logs() as logs:
        source(hub).resolve(repo("org/adapter", runtime_secret_name="absent"))  # noqa: S106 - a name
    assert logs[0]["event"] == "secret is not set, continuing without it"
    with pytest.raises(faults.RepoGated, match="LORAMUX_SECRET_absent"):
        source(hub).resolve(repo("org/gated", runtime_secret_name="absent"))  # noqa: S106 - a name


def test_a_busy_hub_is_asked_again(hub):
    """A status of 503 is tried again; one that stays is SOURCE_UNAVAILABLE."""
    hub.failures[:] = [503]
    assert source(hub).resolve(repo("org/adapter")).repository.revision == COMMIT
    hub.failures[:] = [503, 503]
    with pytest.raises(faults.SourceUnavailable, match="status 503"):
        source(hub).resolve(repo("org/adapter"))


def test_a_download_that_breaks_off_is_asked_for_again(hub, tmp_path):
    """A body that is cut off is fetched again, and its bytes are right in the end."""
    hf = source(hub)
    hub.repos["org/adapter"].truncated = 1
    resolved = hf.resolve(repo("org/adapter"))
    fetched = hf.fetch(resolved, FILES, tmp_path)
    data = hub.repos["org/adapter"].files[FILES[1]]
    assert fetched[FILES[1]].sha256 == hashlib.sha256(data).hexdigest()


def test_a_branch_that_moves_during_a_build(hub, tmp_path):
    """Files come from the commit of the listing, though the branch has moved."""
    hf = source(hub)
    resolved = hf.resolve(repo("org/adapter"))
    moved = hub.repos["org/adapter"]
    moved.revisions |= {"main": OLD, "before": COMMIT}
    hf.fetch(resolved, FILES, tmp_path)
    assert [path for _, path in hub.requests if "/resolve/" in path and COMMIT not in path] == []
    del moved.revisions["before"]
    with pytest.raises(faults.RevisionNotFound, match=f"no revision '{COMMIT}'"):
        hf.fetch(resolved, FILES, tmp_path / "again")


def test_digests_of_large_files_are_taken_from_the_hub(hub, tmp_path):
    """A build records a base without a download of its weights; a replica downloads and verifies them."""
    sources = Sources({SourceKind.HF: source(hub)})
    base = describe_base(sources, repo("org/base"))
    assert "model.safetensors" not in hub.downloaded()
    weights = hub.repos["org/base"].files["model.safetensors"]
    assert base.record.files["model.safetensors"].sha256 == hashlib.sha256(weights).hexdigest()
    assert base.record.source.revision == COMMIT
    folder = fetch_base(base.record, tmp_path / "cache", sources)
    assert (folder / "model.safetensors").read_bytes() == weights
    hub.requests.clear()
    assert fetch_base(base.record, tmp_path / "cache", sources) == folder
    assert hub.requests == []


def test_nothing_stays_open(hub, tmp_path, monkeypatch):
    """Refused, cancelled and broken downloads leave no connection and no file, though failures are kept."""
    # The hub's client rests between its own attempts.
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None))
    hub.repos["org/large"] = HubRepo({"main": COMMIT}, {"large": bytes(3 << 20)})
    hf = source(hub)
    resolved = hf.resolve(repo("org/large"))
    hf.fetch(resolved, ["large"], tmp_path / "warm")
    with expect_nothing_open() as retained:
        keep_fault(lambda: hf.resolve(repo("org/absent")), retained)
        keep_fault(lambda: hf.fetch(resolved, ["large"], tmp_path / "a", cancel_after(1 << 20)), retained)
        keep_fault(lambda: hf.digests(resolved, ["large"], cancel_after(1 << 20)), retained)
        hub.repos["org/large"].truncated = 99
        keep_fault(lambda: hf.fetch(resolved, ["large"], tmp_path / "b"), retained)
        hub.repos["org/large"].truncated = 0
        hub.repos["org/large"].files["large"] = b"changed"
        keep_fault(lambda: hf.fetch(resolved, ["large"], tmp_path / "c"), retained)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_what_arrives_is_what_the_hub_lists(hub, tmp_path, name):
    """A flipped bit is repaired by a second download; one that stays is BUNDLE_CORRUPT, and no file."""
    hf, base = source(hub), hub.repos["org/base"]
    resolved = hf.resolve(repo("org/base"))
    base.damaged[name] = 1
    hf.fetch(resolved, [name], tmp_path / "a")
    assert (tmp_path / "a" / name).read_bytes() == base.files[name]
    base.damaged[name] = 99
    with pytest.raises(faults.BundleCorrupt, match=r"twice not what the hub lists: expected (sha256|git:)"):
        hf.fetch(resolved, [name], tmp_path / "b")
    assert not (tmp_path / "b" / name).exists()
    assert hub.downloaded().count(name) == 4


@pytest.mark.parametrize("commit", ["../../../evil", "main", "c" * 39, "/etc", "C" * 40, "c" * 40 + "\n"])
def test_a_commit_is_a_commit(hub, commit):
    """A hub's commit becomes the name of a folder, so only 40 or 64 hex digits are taken."""
    hub.repos["org/adapter"].revisions["main"] = commit
    with pytest.raises(faults.SourceUnavailable, match="expected a commit"):
        source(hub).resolve(repo("org/adapter"))


@pytest.mark.parametrize("revision", ["../../../evil", "..", "a\\..\\b"])
def test_a_recorded_revision_stays_in_the_cache(hub, tmp_path, revision):
    """A generation that another client wrote leads no source out of its cache, nor into another's."""
    files = {"config.json": FileDigest(size=1, sha256="0" * 64)}
    with pytest.raises(faults.SourceRefused, match="not a path inside"):
        source(hub).place(repo("org/base", revision=revision), files, tmp_path / "cache" / "deep" / "er")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("sibling", [{"size": "x"}, {"rfilename": 5}, {"lfs": {"sha256": "../x"}}, {"lfs": 5}])
def test_a_listing_that_is_none_is_named(hub, sibling):
    """A listing with other types than the hub's is SOURCE_UNAVAILABLE, never a failure inside."""
    hub.repos["org/adapter"].listed = sibling
    with pytest.raises(faults.SourceUnavailable):
        source(hub).resolve(repo("org/adapter"))


MODEL, LORA = "Q4_K_M/Tiny-Q4_K_M.gguf", "tiny-lora-f16.gguf"


@pytest.fixture
def blocks(hub: Hub) -> HubSource:
    """The hub has a repository of GGUF: a model in a folder, one in two files, and an adapter."""
    whole, parts = PARTS[0], {}
    for number, places in enumerate((whole.places[:2], whole.places[2:])):
        own = [("split.no", 2, number), ("split.count", 2, 2), ("split.tensors.count", 5, len(whole.places))]
        begin, end = places[0][3], places[-1][3] + 4 * math.prod(places[-1][1])
        moved = tuple((name, sizes, kind, offset - begin) for name, sizes, kind, offset in places)
        entries = (*(() if number else whole.entries), *own)
        parts[f"Big-0000{number + 1}-of-00002.gguf"] = GgufParts(entries, moved, whole.data[begin:end]).pack()
    fields = (("general.architecture", 8, "llama"), ("general.type", 8, "adapter"))
    files = {MODEL: whole.pack(), LORA: GgufParts(fields, (), b"").pack(), "README.md": b"x"} | parts
    hub.repos["org/gguf"] = HubRepo({"main": COMMIT}, files, lfs=tuple(files))
    return source(hub)


@pytest.mark.parametrize("name", [MODEL, "Big-00002-of-00002.gguf"])
def test_a_file_of_gguf_in_a_repository_is_a_base(
    hub: Hub, blocks: HubSource, tmp_path: Path, name: str
) -> None:
    """The header alone is read for the record, twice where that breaks off; a replica makes the rest too."""
    hub.repos["org/gguf"].truncated = 1
    sources = Sources({"HF": blocks}, tmp_path)
    base = describe_base(sources, repo("org/gguf", subfolder=name))
    for file, data in hub.repos["org/gguf"].files.items():
        path = tmp_path / "here" / Path(file).name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    local = LocalSource([tmp_path])
    here = Repository(source=SourceKind.LOCAL, repo=str(tmp_path / "here" / Path(name).name))
    assert base.record.files == describe_base(Sources({"LOCAL": local}), here).record.files
    assert base.record.source.revision == COMMIT
    hub.requests.clear()
    folder = fetch_base(base.record, tmp_path / "cache", sources)
    assert {path.name for path in folder.iterdir()} == base.record.files.keys()
    count = len(hub.requests)
    fetch_base(base.record, tmp_path / "cache", sources)
    assert len(hub.requests) == count
    next(folder.glob("*.gguf")).write_bytes(b"another")
    assert fetch_base(base.record, tmp_path / "cache", sources) == folder


def test_a_file_of_gguf_in_a_repository_is_an_adapter(hub: Hub, blocks: HubSource, tmp_path: Path) -> None:
    """The one that is named, of several; it is listed as an adapter for its header."""
    resolved = blocks.resolve(repo("org/gguf", subfolder=LORA))
    assert [*resolved.files] == ["adapter.gguf"]
    blocks.fetch(resolved, resolved.files, tmp_path)
    assert (tmp_path / "adapter.gguf").read_bytes() == hub.repos["org/gguf"].files[LORA]


def test_files_of_gguf_that_are_not_there_are_refused_by_name(hub: Hub, blocks: HubSource) -> None:
    """A file, or one of a model's; a repository that was named without its file says how to name it."""
    with pytest.raises(faults.RepoNotFound, match=r"no file 'b\.gguf' at"):
        blocks.resolve(repo("org/gguf", subfolder="b.gguf"))
    del hub.repos["org/gguf"].files["Big-00001-of-00002.gguf"]
    with pytest.raises(faults.RepoNotFound, match=r"no file 'Big-00001-of-00002\.gguf'"):
        blocks.resolve(repo("org/gguf", subfolder="Big-00002-of-00002.gguf"))
    with pytest.raises(faults.CheckpointInvalid, match=r"subfolder: Big-00002-of-00002\.gguf, or"):
        describe_base(Sources({"HF": blocks}), repo("org/gguf"))
