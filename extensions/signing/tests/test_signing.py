"""Signatures of folders: the signer, the signed files, and agreement with the library's own command."""

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loramux.cli.main import app
from loramux_shared.faults import SettingsInvalid, SignatureInvalid
from loramux_shared.settings import BuilderSettings, load_settings
from loramux_shared.signatures import SIGNATURE, parse_signer, read_signer
from loramux_signing.folder import verify_folder
from loramux_signing.openssf import sign_folder, verified
from tests.signing_keys import new_certificate, new_key
from tests.support.adapters import write_adapter


@pytest.fixture
def adapter(tmp_path):
    """A folder with an adapter, a file in a folder of it, and git's own."""
    folder = write_adapter(tmp_path / "adapter")
    (folder / "docs").mkdir()
    (folder / "docs" / "notes.txt").write_text("n")
    (folder / ".gitattributes").write_text("*")
    return folder


def command(*words: str) -> int:
    """Run the library's command, and return its exit code."""
    from click.testing import CliRunner as Click
    from model_signing._cli import main

    return Click().invoke(main, list(words)).exit_code


@pytest.mark.parametrize("kind", ["key", "certificate"])
def test_folders_are_signed_as_the_library_does_it(adapter, tmp_path, kind):
    """`loramux sign` and the library verify each other's signatures, and both refuse a changed folder."""
    (new_key if kind == "key" else new_certificate)(tmp_path)
    key, signature = str(tmp_path / "key.pem"), str(adapter / SIGNATURE)
    ours, theirs, signer, trust = ["--key", key], ["--private_key", key], tmp_path / "key.pub", "--public_key"
    if kind == "certificate":
        chain, signer, trust = str(tmp_path / "key.chain"), tmp_path / "key.ca", "--certificate_chain"
        ours += ["--certificates", chain]
        theirs += ["--signing_certificate", chain, "--certificate_chain", chain]
    verify = ["verify", str(adapter), "--signed-by", str(signer)]
    run = CliRunner()
    assert run.invoke(app, ["sign", str(adapter), *ours]).exit_code == 0
    assert command("verify", kind, str(adapter), "--signature", signature, trust, str(signer)) == 0
    assert run.invoke(app, verify).exit_code == 0
    assert command("sign", kind, str(adapter), "--signature", signature, *theirs) == 0
    assert json.loads(run.invoke(app, [*verify, "--json"]).stdout)["verified"] == "3 files"
    (adapter / "docs" / "notes.txt").write_text("m")
    assert command("verify", kind, str(adapter), "--signature", signature, trust, str(signer)) == 1
    refused = run.invoke(app, verify)
    assert (refused.exit_code, "notes.txt (changed)" in refused.stderr) == (1, True)


@pytest.mark.parametrize(
    "change", ["another file", "a file less", "another key", "no signature", "a link", "a linked folder"]
)
def test_a_folder_that_is_not_what_was_signed_is_refused(adapter, tmp_path, change):
    """Files that came or went, a signature of another client and none at all are told apart."""
    key, signer = new_key(tmp_path)
    expected = {
        "another file": r"model\.bin \(not signed\)",
        "a file less": r"notes\.txt \(gone\)",
        "another key": "not of key",
        "no signature": "found none",
        "a link": "a link",
        "a linked folder": "a link",
    }[change]
    (adapter / SIGNATURE).write_bytes(sign_folder(adapter, key))
    if change == "another file":
        (adapter / "model.bin").write_text("x")
    elif change == "a file less":
        (adapter / "docs" / "notes.txt").unlink()
    elif change == "another key":
        _, signer = new_key(tmp_path, "other")
    elif change.startswith("a link"):
        (adapter / "link").symlink_to("docs" if "folder" in change else "docs/notes.txt")
    else:
        (adapter / SIGNATURE).unlink()
    with pytest.raises(SignatureInvalid, match=expected):
        verify_folder(adapter, adapter / SIGNATURE, [signer])


def test_a_signature_that_was_changed_anywhere_is_refused_by_name(adapter, tmp_path, capsys):
    """Bytes that were flipped, cut or doubled, and JSON that says otherwise, end in one fault."""
    (key, mine), (_, others) = new_key(tmp_path), new_certificate(tmp_path, "other")
    whole, drawn = sign_folder(adapter, key), random.Random(18)
    bundle = json.loads(whole)
    odd = [b"", b"[]", b"[" * 100_000, b"{}", whole[:-1], whole * 2, b'{"verificationMaterial":{}}', b"\xff"]
    for name in ("verificationMaterial", "dsseEnvelope", "mediaType"):
        odd += [json.dumps(bundle | {name: value}).encode() for value in (None, 7, [], {}, "x", {"payload": 1})]
    for name in bundle["dsseEnvelope"]:
        envelope = [bundle["dsseEnvelope"] | {name: value} for value in (None, 7, [], [{}], "", "e30=", "!")]
        odd += [json.dumps(bundle | {"dsseEnvelope": each}).encode() for each in envelope]
    chain = {"x509CertificateChain": {"certificates": [{"rawBytes": "AAAA"}]}, "tlogEntries": []}
    old = {"publicKey": {"rawBytes": "AAAA"}, "tlogEntries": []}  # before the library's 1.0
    odd += [json.dumps(bundle | {"verificationMaterial": each}).encode() for each in (chain, old)]
    for _ in range(100):
        at = drawn.randrange(len(whole))
        odd.append(whole[:at] + bytes([whole[at] ^ (1 << drawn.randrange(7))]) + whole[at + 1 :])
    good = verified(whole, [others, mine], "x").files
    accepted = 0
    for data in odd:
        try:  # a bit of what does not count, as a name of a field that nobody reads, may change
            accepted += verified(data, [others, mine], "x").files == good
        except SignatureInvalid:
            continue
    assert accepted <= 2
    with pytest.raises(SignatureInvalid, match=r"1\.0 or newer"):
        verified(json.dumps(bundle | {"verificationMaterial": old}).encode(), [mine], "x")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sigstore:me@my.org",
        "sigstore:http://issuer#me",
        "-----BEGIN PUBLIC KEY-----",
        "no/such/file",
        "A" * 70_000,
    ],
)
def test_what_names_no_signer_is_refused(tmp_path, text):
    """A setting that names no signer ends the start with the expected form."""
    with pytest.raises(ValueError, match=r"expected|sigstore|PEM|at most"):
        read_signer(text, tmp_path)


def test_a_private_key_is_never_taken_for_a_signer(tmp_path):
    """A private key is refused as a signer: builders would receive it, and stores would hold it."""
    key, signer = new_key(tmp_path)
    with pytest.raises(ValueError, match="found a private key"):
        read_signer("key.pem", tmp_path)
    assert parse_signer(f"a comment\n{signer}another") == signer
    with pytest.raises(SettingsInvalid, match=r"LORAMUX_REQUIRE_SIGNATURE|require-signature"):
        load_settings(BuilderSettings, require_signature=str(key.key))


def test_keys_that_cannot_sign_are_refused_by_name(adapter, tmp_path, capsys):
    """A key of another kind, with a password or without its certificate is a setting to correct."""
    path = Path(tmp_path / "key.pem")
    run = CliRunner()
    for text in ("", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"):
        path.write_text(text)
        result = run.invoke(app, ["sign", str(adapter), "--key", str(path)])
        assert (result.exit_code, "SETTINGS_INVALID" in result.stderr) == (2, True)
    assert not (adapter / SIGNATURE).exists()
