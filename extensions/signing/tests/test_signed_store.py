"""Generations that are signed: by every writer, and none other is used."""

import sys
from datetime import UTC, datetime, timedelta

import pytest
from typer.testing import CliRunner

from builder_service.builder import Builder
from builder_service.pipeline.build import build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.making import open_workshop
from builder_service.pipeline.progress import Progress
from builder_service.pipeline.push import PushedAdapter
from builder_service.pipeline.update import Update, push, rollback, update
from inference_service.adapters.changing import StoredBundles
from inference_service.replica import Replica
from loramux.cli.main import app
from loramux.messages import deployment_from_message, deployment_to_message
from loramux_shared import faults
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.bundle.generation import Generation, current_key, generation_key, signature_key
from loramux_shared.bundle.manifest import MANIFEST_FILE, bundle_key, sha256_hex
from loramux_shared.bundle.orphans import Retention, find_orphans, remove
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.deployment_file import load_deployment, parse_deployment
from loramux_shared.settings import BuilderSettings, InferenceSettings
from loramux_shared.signatures import SIGNATURE, signed_store
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.local import LocalStore
from loramux_signing.openssf import sign_folder
from loramux_signing.store import sign_object
from tests.signing_keys import new_certificate, new_key
from tests.support.adapters import tensors, write_adapter, write_base

FIRST = generation_key("tiny", 1)


class World:
    """A store, a builder that signs and one that does not."""

    def __init__(self, folder):
        self.folder = folder
        self.key, self.signer = new_key(folder)
        self.plain = LocalStore(folder / "store")
        self.signed = signed_store(self.plain, (), self.key)
        self.trusting = signed_store(self.plain, [self.signer])
        """Store as a replica sees it."""
        write_base(folder / "base")
        for seed, name in enumerate(("one", "two")):
            write_adapter(folder / name, tensors(seed=seed))

    def repository(self, name):
        """An adapter's, or the base's."""
        return {"source": "LOCAL", "repo": str(self.folder / name)}

    def context(self, store):
        """Return the context of a builder."""
        return BuildContext(store, open_sources(local_roots=[self.folder]), self.folder / "work")

    def build(self, store, *names, **settings) -> Generation:
        adapters = {name: self.repository(name) for name in names}
        data = {"checkpoint_repository": self.repository("base"), "lora_adapters": adapters} | settings
        deployment = parse_deployment({"model_name": "tiny", "build": data}).deployment
        return build(deployment, self.context(store), Progress(adapters)).generation


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_every_writer_signs_and_gc_takes_both(world):
    """Builds, updates and rollbacks publish signed generations, and gc removes signatures with generations."""
    context = world.context(world.signed)
    world.build(world.signed, "one")
    two = Repository(source=SourceKind.LOCAL, repo=str(world.folder / "two"))
    update(Update(name="tiny", add={"two": two}), context, Progress(["two"]))
    rollback("tiny", None, None, context)
    assert current_generation(world.trusting, "tiny").number == 3
    signatures = [signature_key(generation_key("tiny", number)) for number in (1, 2, 3)]
    assert [key for key in world.plain.list("deployments/tiny/") if key.endswith(".sig")] == signatures
    later = datetime.now(UTC) + timedelta(days=2)
    found = find_orphans(world.plain, grace=timedelta(days=1), now=later, retention=Retention(count=0))
    assert all(remove(world.plain, orphan) for orphan in found.old)
    lost = generation_key("tiny", 7)  # its builder was killed, or is about to write it
    world.plain.put(signature_key(lost), b"")
    [left] = find_orphans(world.plain, grace=timedelta(days=1), now=later).old
    world.plain.put(lost, world.plain.get(generation_key("tiny", 3)))
    assert not remove(world.plain, left)
    world.plain.delete(lost)
    assert remove(world.plain, left)
    assert [key for key in world.plain.list("deployments/tiny/") if key.endswith(".sig")] == signatures[2:]


def test_what_is_not_signed_is_not_read(world):
    """A generation that was changed, or is signed by nobody or another client, is refused by name."""
    world.build(world.signed, "one")
    store, key, _ = world.plain, *new_key(world.folder, "other")
    other = generation_key("other", 1)
    data, pointer, mine = (store.get(name) for name in (FIRST, current_key("tiny"), signature_key(FIRST)))
    changed = data.replace(b'"max_lora_rank":64', b'"max_lora_rank":65')
    moved = pointer.replace(sha256_hex(data).encode(), sha256_hex(changed).encode())
    for harm in (
        {FIRST: changed, current_key("tiny"): moved},
        {signature_key(FIRST): sign_object(FIRST, data, key)},
        {signature_key(FIRST): sign_object(other, data, world.key)},
        {signature_key(FIRST): b"{}"},
        {signature_key(FIRST): None},
    ):
        for name, value in (
            {FIRST: data, current_key("tiny"): pointer, signature_key(FIRST): mine} | harm
        ).items():
            store.delete(name) if value is None else store.put(name, value)
        assert current_generation(store, "tiny").number == 1
        with pytest.raises(faults.SignatureInvalid, match=r"generations/00000001\.json"):
            current_generation(world.trusting, "tiny")
    add = Update(name="tiny", add={"two": Repository(source=SourceKind.LOCAL, repo=str(world.folder / "two"))})
    with pytest.raises(faults.SignatureInvalid):  # nobody continues from what others wrote, and signs it
        update(add, world.context(world.signed), Progress(["two"]))
    world.build(world.signed, "one", "two")
    assert current_generation(world.trusting, "tiny").number == 2


def test_a_deployment_is_signed_and_verified_by_hand(world):
    """`loramux sign` makes one good that a builder without a key published; `verify` reads every byte of it."""
    run, store = CliRunner(), ["--store", f"file://{world.folder}/store"]
    world.build(world.plain, "one", "two")
    verify = ["verify", "tiny", *store, "--signed-by", str(world.folder / "key.pub")]
    assert "SIGNATURE_INVALID" in run.invoke(app, verify).stderr
    assert run.invoke(app, ["sign", "tiny", *store, "--key", str(world.key.key)]).exit_code == 0
    assert "generation 1, 2 bundles" in run.invoke(app, verify).stdout
    key = next(key for key in world.plain.list("bundles/") if key.endswith("weights.npy"))
    data = world.plain.get(key)
    world.plain.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    assert "BUNDLE_CORRUPT" in run.invoke(app, verify).stderr


async def test_a_replica_that_requires_signatures_starts_and_loads_nothing_without(world, monkeypatch):
    """The start fails before the base is read, and a bundle that an operator names by digest is refused."""
    monkeypatch.setattr(sys, "setswitchinterval", print)
    digest = world.build(world.plain, "one").adapters["one"].digest
    public = str(world.folder / "key.pub")
    store = f"file://{world.folder}/store"
    settings = InferenceSettings(deployment="tiny", store=store, require_signature=public)
    with pytest.raises(faults.SignatureInvalid, match="found none"):
        await Replica.load(settings)
    assert (await StoredBundles(world.trusting).record(digest)).digest == digest
    with pytest.raises(
        faults.RequestInvalid, match="lora_path: expected an adapter that comes with a signed gen"
    ):
        await StoredBundles(world.trusting, refused=True).record(digest)
    with pytest.raises(faults.BundleNotFound, match="bundle:0000"):
        await StoredBundles(world.trusting).record("0" * 64)
    world.trusting.put(bundle_key("1" * 64, MANIFEST_FILE), b"{}")
    with pytest.raises(faults.BundleCorrupt, match="manifest is damaged"):
        await StoredBundles(world.trusting).record("1" * 64)


async def test_a_builder_that_would_not_take_its_own_word_does_not_start(world):
    """A builder that requires signatures must sign, with a key that it accepts itself."""
    fields = {"store": f"file://{world.folder}/store", "work_dir": world.folder / "work"}
    key, _ = new_certificate(world.folder, "other")
    for wrong in (
        {"require_signature": str(world.folder / "key.pub")},
        {"signing_key": key.key, "signing_certificates": key.certificates},
        {
            "signing_key": key.key,
            "signing_certificates": key.certificates,
            "require_signature": str(world.folder / "key.pub"),
        },
    ):
        with pytest.raises(faults.SettingsInvalid, match="LORAMUX_SIGNING_"):
            await Builder.open(BuilderSettings(**fields, **wrong))


@pytest.mark.parametrize("harm", ["", "a byte", "a file", "another key", "no signature"])
def test_an_adapter_is_taken_only_as_it_was_signed(world, harm):
    """A build verifies the bytes that it reads, and publishes nothing that differs; others do not matter."""
    folder = world.folder / "one"
    (folder / "unread.txt").write_text("not fetched")
    (folder / SIGNATURE).write_bytes(sign_folder(folder, world.key))
    (folder / "unread.txt").unlink()
    signer = new_key(world.folder, "other")[1] if harm == "another key" else world.signer
    if harm == "a byte":
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    elif harm == "a file":
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    elif harm == "no signature":
        (folder / SIGNATURE).unlink()
    if not harm:
        first = world.build(world.plain, "one")
        again = world.build(world.plain, "one", signed_by=[signer])  # what was kept was not verified
        assert (again.number, again.recipe.signed_by) == (2, (signer,))
        assert again.adapters["one"].digest == first.adapters["one"].digest
        return
    with pytest.raises(faults.AdapterInvalid) as refused:
        world.build(world.plain, "one", signed_by=[signer])
    assert [finding.code for finding in refused.value.findings] == ["E_SIGNATURE"]
    assert not list(world.plain.list(""))


def test_what_comes_in_later_is_signed_too(world):
    """Updates and pushes obey the deployment's signers, and a pushed signature is verified and left out."""
    world.build(world.plain, signed_by=[world.signer])
    context, two = world.context(world.plain), world.folder / "two"
    add = Update(name="tiny", add={"two": Repository(source=SourceKind.LOCAL, repo=str(two))})
    with pytest.raises(faults.AdapterInvalid, match="E_SIGNATURE"):
        update(add, context, Progress(["two"]))
    signature = sign_folder(two, world.key)
    for sent in (None, b"{}", signature):
        with open_workshop(context, world.plain, Progress(["sent"])) as workshop:
            adapter = PushedAdapter("tiny", "sent", workshop.work / "adapter-0", workshop.space)
            for path in two.iterdir():
                adapter.write(path.name, path.read_bytes())
            if sent is not None:
                adapter.write(SIGNATURE, sent)
            if sent is signature:
                _, record = push(adapter, workshop, None)
                continue
            with pytest.raises(faults.AdapterInvalid, match="E_SIGNATURE"):
                push(adapter, workshop, None)
    (two / SIGNATURE).write_bytes(signature)
    generation = update(add, context, Progress(["two"])).generation
    assert generation.adapters["two"].digest == record.digest == generation.adapters["sent"].digest


def test_a_base_is_taken_only_as_it_was_signed(world):
    """The files of a base are compared with the signature, whatever the hub or the folder reports."""
    base = world.folder / "base"
    with pytest.raises(faults.SignatureInvalid, match="found none"):
        world.build(world.plain, "one", base_signed_by=[world.signer])
    (base / SIGNATURE).write_bytes(sign_folder(base, world.key))
    assert world.build(world.plain, "one", base_signed_by=[world.signer]).number == 1
    (base / "config.json").write_text((base / "config.json").read_text() + " ")
    with pytest.raises(faults.SignatureInvalid, match=r"config\.json \(changed\)"):
        world.build(world.plain, "one", base_signed_by=[world.signer])


def test_a_file_names_signers_by_files_beside_it(world):
    """A client sends a builder the key itself, which comes back the same; a file without a key is refused."""
    path = world.folder / "deployment.yaml"
    text = "build:\n  checkpoint_repository: {source: HF, repo: org/base}\n  signed_by: [%s]\n"
    path.write_text(text % "key.pub, 'sigstore:https://issuer.example.com#me'")
    deployment = load_deployment(path).deployment
    assert deployment.build.signed_by == (world.signer, "sigstore:https://issuer.example.com#me")
    assert deployment_from_message(deployment_to_message(deployment)) == deployment
    for word in ("key.pem", "nowhere.pub", "sigstore:me"):
        path.write_text(text % word)
        with pytest.raises(faults.DeploymentInvalid, match=r"build\.signed_by") as refused:
            load_deployment(path)
        assert "PRIVATE" not in str(refused.value)
