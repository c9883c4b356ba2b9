"""``loramux sign`` and ``loramux verify``: folders of adapters, and deployments in a store."""

from pathlib import Path
from typing import Annotated, Final

import typer

from loramux.cli import shell
from loramux.cli.documents import emit
from loramux.cli.local.services import StoreFlag
from loramux_shared.bundle.deployments import current_generation, stored_deployments
from loramux_shared.bundle.generation import Generation, generation_key, signature_key
from loramux_shared.faults import DeploymentNotFound, SettingsInvalid
from loramux_shared.settings import BuilderSettings, load_settings, variable
from loramux_shared.signatures import SIGNATURE, SigningKey
from loramux_shared.storage.base import Store
from loramux_shared.storage.open import open_store
from loramux_shared.wording import counted
from loramux_signing.folder import verify_folder
from loramux_signing.openssf import sign_folder
from loramux_signing.store import check_signature, sign_object, signed_store

KEY: Final = variable("signing_key")
CERTIFICATES: Final = variable("signing_certificates")
SIGNERS: Final = variable("require_signature")

Target = Annotated[
    str, typer.Argument(metavar="FOLDER|DEPLOYMENT", help="Folder of an adapter, or a deployment.")
]


@shell.command
def sign(
    target: Target,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key", envvar=KEY, show_envvar=False, metavar="FILE", help=f"Private key (PEM); default: {KEY}."
        ),
    ] = None,
    certificates: Annotated[
        Path | None,
        typer.Option(
            "--certificates",
            envvar=CERTIFICATES,
            show_envvar=False,
            metavar="FILE",
            help="Certificates of the key, its own first.",
        ),
    ] = None,
    sigstore: Annotated[
        bool, typer.Option("--sigstore", help="Sign with your identity of an OpenID issuer.")
    ] = False,
    store: StoreFlag = None,
    as_json: shell.Json = False,
) -> None:
    """Sign a folder, or what is served of a deployment.

    A folder gets model.sig, as OpenSSF's model_signing writes it. A deployment is
    signed in its store; builders with LORAMUX_SIGNING_KEY do that by themselves.

    Example: loramux sign ./my-adapter --key release.pem
    """
    if sigstore == (key is not None):
        raise SettingsInvalid("expected either --key FILE or --sigstore")
    by = SigningKey(key.expanduser(), certificates and certificates.expanduser()) if key else None
    folder = Path(target).expanduser()
    if folder.is_dir():
        signature = sign_folder(folder, by)
        written = str(folder / SIGNATURE)
        (folder / SIGNATURE).write_bytes(signature)
    else:
        opened = open_store(load_settings(BuilderSettings, store=store, require_signature=()).store)
        generation = _served(opened, target)
        name = generation_key(target, generation.number)
        signature = sign_object(name, generation.to_bytes(), by)
        written = signature_key(name)
        opened.put(written, signature)
    if as_json:
        emit({"signature": written})
    else:
        shell.show(f"{target} is signed: {written}")


@shell.command
def verify(
    target: Target,
    signed_by: shell.SignedBy = None,
    signature: Annotated[
        Path | None,
        typer.Option("--signature", metavar="FILE", help=f"Signature of a folder; default: its {SIGNATURE}."),
    ] = None,
    store: StoreFlag = None,
    as_json: shell.Json = False,
) -> None:
    """Verify that a folder or a deployment is as signed.

    SIGNER is the file of a key or of authorities, or sigstore:ISSUER#IDENTITY; else
    LORAMUX_REQUIRE_SIGNATURE. Of a deployment every byte of every bundle is read.
    Exit 1 if anything differs.

    Example: loramux verify ./my-adapter --signed-by release.pub
    """
    settings = load_settings(BuilderSettings, store=store, require_signature=shell.signers(signed_by) or None)
    if not settings.require_signature:
        raise SettingsInvalid(f"expected --signed-by SIGNER, or {SIGNERS}, found neither")
    folder = Path(target).expanduser()
    if folder.is_dir():
        signed = verify_folder(folder, signature or folder / SIGNATURE, settings.require_signature)
        by, what = signed.by, f"{len(signed.files)} files"
    else:
        by, what = _verify_deployment(open_store(settings.store), target, settings.require_signature)
    if as_json:
        emit({"target": target, "signed_by": by, "verified": what})
    else:
        shell.show(f"{target} is signed by {by}: {what}")


def _verify_deployment(store: Store, name: str, signers: tuple[str, ...]) -> tuple[str, str]:
    """Return the signer of the served generation and its content, after all of that was read."""
    from loramux_shared.bundle.reader import read_bundle  # numpy

    generation = _served(signed_store(store, signers), name)
    key = generation_key(name, generation.number)
    by = check_signature(key, store.get(key), store.get(signature_key(key)), signers)
    digests = {record.digest for record in generation.adapters.values()}
    with shell.working(f"reading {len(digests)} bundles"):
        for digest in sorted(digests):
            read_bundle(store, digest)
    return by, f"generation {generation.number}, {counted(len(digests), 'bundle')}"


def _served(store: Store, name: str) -> Generation:
    generation = current_generation(store, name)
    if generation is None:
        known = stored_deployments(store)
        raise DeploymentNotFound(
            f"{name[:128]!r} is no folder here and no deployment of {store.uri}. There: {known}."
        )
    return generation
