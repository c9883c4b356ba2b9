"""Archives and public addresses of sources."""

import gzip
import tarfile
import tempfile
import tracemalloc
from contextlib import nullcontext
from ipaddress import ip_address

import pytest

from loramux_shared.faults import SourceRefused, SourceUnavailable
from loramux_shared.sources.archive import MAX_UNPACKED, Archive, inner_files
from loramux_shared.sources.base import MAX_FILES, SourceFile
from loramux_shared.sources.public import AddressGuard, is_public
from tests.support.archive_files import member, pack, pack_members, zeros
from tests.support.cases import cases

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 9000}


def opened(data: bytes, max_unpacked: int = MAX_UNPACKED) -> Archive:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the archive
    file.write(data)
    file.flush()
    return Archive(file, "an archive", len(data), max_unpacked)


def test_names_are_made_plain():
    """``./`` before names, and folders as members, change nothing."""
    folder, file = member("./", kind=tarfile.DIRTYPE), member("./x/./y", 1)
    assert list(opened(pack_members([(folder, b""), (file, b"1")])).listing()) == ["x/y"]


LINKS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (pack({"/etc/cron.d/x": b"x"}), "leads outside of the archive"),
        (pack({"a/../../x": b"x"}), "leads outside of the archive"),
        (pack({"..\\x": b"x"}), "leads outside of the archive"),
        *((pack_members([(member("x", 0, kind, "/etc/passwd"), b"")]), "links and devices") for kind in LINKS),
        (pack_members([(member("x", 0, tarfile.GNUTYPE_SPARSE), b"")]), "neither a file nor a folder"),
        (pack_members([(member("x", 1), b"1"), (member("./x", 1), b"2")]), "appears twice"),
        (pack({str(i): b"" for i in range(MAX_FILES + 1)}), f"more than {MAX_FILES}"),
        (b"PK\3\4 a zip", "not a tar.gz"),
        (gzip.compress(b"<html>not found</html>", mtime=0), "not a tar.gz"),
        (pack(FILES)[:-20], "not a tar.gz archive, or damaged"),
        (pack(FILES)[:-8] + bytes(8), "not a tar.gz archive, or damaged"),
        (b"", "not a tar.gz"),
    ],
)
def test_hostile_archives_are_refused(data, text):
    """An archive is refused whole if a member is no plain file inside, or it is damaged or is no archive."""
    with pytest.raises(SourceRefused, match=text):
        opened(data).listing()


def test_a_file_that_is_cut_off_is_refused():
    """A header that promises more than the archive has is a damaged archive."""
    whole = gzip.decompress(pack(FILES))
    for length in (700, 512 * 4 + 100):
        with pytest.raises(SourceRefused, match="damaged"):
            opened(gzip.compress(whole[:length])).listing()


def test_a_bomb_is_refused_before_it_goes_off():
    """A small archive that unpacks to far more than it has is refused at the limit."""
    size = 96 << 20
    header = member("adapter_model.safetensors", size).tobuf()
    bomb = gzip.compress(header, 1) + zeros(size)
    assert len(bomb) < 1 << 20
    with pytest.raises(SourceRefused, match="the limit"):
        opened(bomb, 64 << 20).listing()


def test_a_long_name_is_not_read_into_memory():
    """A header that says that its name has 100 MB is refused without reading it."""
    data = gzip.compress(member("././@LongLink", 100 << 20, tarfile.GNUTYPE_LONGNAME).tobuf()) + zeros(
        100 << 20
    )
    archive = opened(data)
    tracemalloc.start()
    with pytest.raises(SourceRefused, match="a header of more than"):
        archive.listing()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_headers_that_nest_are_refused():
    """A thousand long names in a row end neither the process nor the check."""
    name = member("././@LongLink", 4, tarfile.GNUTYPE_LONGNAME).tobuf() + b"abc\0".ljust(512, b"\0")
    with pytest.raises(SourceRefused, match="a header of more than"):
        opened(gzip.compress(name * 3000)).listing()


def peak_of_listing(data: bytes, refusal: str) -> int:
    """Return the most bytes that a listing held; a refusal that is empty means that there is none."""
    archive = opened(data)
    tracemalloc.start()
    try:
        with pytest.raises(SourceRefused, match=refusal) if refusal else nullcontext():
            archive.listing()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def attributes(size: int, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """Return a header of pax with so many bytes of short attributes, each of another name."""
    fields = b"".join(b"13 k%06d=x\n" % number for number in range(size // 13))
    header = tarfile.TarInfo("pax")
    header.type, header.size = kind, len(fields)
    return header.tobuf() + fields.ljust(-(-len(fields) // 512) * 512, b"\0")


def test_attributes_of_all_members_are_bounded():
    """A header that tarfile would copy for each member is refused, before it is copied for a second one."""
    data = attributes(60_000, tarfile.XGLTYPE) + b"".join(member(str(n)).tobuf() for n in range(100))
    assert peak_of_listing(gzip.compress(data), "attributes of all members of more than 4096") < 8 << 20
    # Many headers make them large too.
    data = b"".join(
        attributes(1200, tarfile.XGLTYPE).replace(b" k", b" %c" % (97 + n)) + member(str(n)).tobuf()
        for n in range(9)
    )
    with pytest.raises(SourceRefused, match="attributes of all members"):
        opened(gzip.compress(data)).listing()


def test_attributes_of_a_member_are_not_kept():
    """A listing holds names, sizes and digests; what a member carries beside them goes with the member."""
    data = b"".join(attributes(12_000) + member(str(n)).tobuf() for n in range(200))
    assert peak_of_listing(gzip.compress(data + bytes(1024)), "") < 2 << 20


def test_attributes_of_a_member_are_bounded():
    """Several headers before one member count together."""
    data = attributes(30_000) * 3 + member("x").tobuf()
    with pytest.raises(SourceRefused, match="a header of more than 65536"):
        opened(gzip.compress(data + bytes(1024))).listing()


def test_digits_of_a_header_are_bounded():
    """Digits without an end, which tarfile of some releases searches again from each, are refused."""
    header = attributes(60_000)[:512] + b"1" * 60_000
    with pytest.raises(SourceRefused, match="more than 128 digits in a row"):
        opened(gzip.compress(header + bytes(4096))).listing()


def test_a_name_has_so_many_characters():
    """A name of a thousand characters is taken, and a longer one refused, for a listing holds all of them."""
    assert list(opened(pack({"x" * 1024: b""})).listing()) == ["x" * 1024]
    with pytest.raises(SourceRefused, match="a name of more than 1024 characters"):
        opened(pack({"x" * 1025: b""})).listing()


def test_a_negative_size_is_refused():
    """A size below zero, which would lead back to the same header for ever, is refused."""
    buffer = bytearray(member("x", 0).tobuf())
    buffer[124:136] = b"\xff" * 10 + b"\xfc\x00"
    buffer[148:156] = b" " * 8
    buffer[148:156] = b"%06o\0 " % sum(buffer)
    with pytest.raises(SourceRefused, match="an archive: "):
        opened(gzip.compress(bytes(buffer) + bytes(1024))).listing()


@pytest.mark.parametrize(("names", "subfolder", "found"), cases(__file__, "FOLDERS"))
def test_one_top_level_folder_is_the_root(names, subfolder, found):
    """An archive of one folder is that folder; a subfolder is looked for inside it, then beside it."""
    listing = {name: SourceFile(0) for name in names}
    assert list(inner_files(listing, subfolder)) == found


@pytest.mark.parametrize("text", cases(__file__, "test_addresses_that_are_not_public"))
def test_addresses_that_are_not_public(text):
    """No private, shared, link-local, loopback, multicast, reserved or translated-to-such address is public."""
    assert not is_public(ip_address(text))


@pytest.mark.parametrize(
    "text",
    ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101", "2002:101:101::"],
)
def test_addresses_that_are_public(text):
    """Public addresses are, also written as IPv6."""
    assert is_public(ip_address(text))


def guard(*answers: str, allowed: tuple[str, ...] = ()) -> AddressGuard:
    """A guard whose name service always answers so."""
    return AddressGuard(allowed, lambda _host, _port: answers)


def test_one_bad_address_refuses_the_name():
    """A name that has a public address and a private one is refused."""
    assert guard("1.1.1.1", "1.1.1.1").addresses("host", 443) == [ip_address("1.1.1.1")]
    with pytest.raises(SourceRefused, match="start the server with LORAMUX_ALLOWED_HOSTS=host"):
        guard("1.1.1.1", "10.0.0.1").addresses("host", 443)
    with pytest.raises(SourceRefused, match="cannot be read"):
        guard("fe80::1%no such zone%").addresses("host", 443)
    with pytest.raises(SourceUnavailable, match="does not resolve"):
        guard().addresses("host", 443)


@pytest.mark.parametrize(
    ("allowed", "passes"),
    [("host", True), ("HOST:8443", True), ("host:443", False), ("ost", False), ("[::1]", False)],
)
def test_the_operator_allows_hosts(allowed, passes):
    """An allowed host may be anywhere, on any port or on the one that is named."""
    wary = guard("10.0.0.1", allowed=(allowed,))
    if passes:
        assert wary.addresses("host", 8443) == [ip_address("10.0.0.1")]
    else:
        with pytest.raises(SourceRefused):
            wary.addresses("host", 8443)


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f000001", "127.1", "localhost", "::1", "0"])
def test_spellings_of_this_machine_are_refused(host):
    """The name service's answer counts for every spelling of this machine."""
    with pytest.raises((SourceRefused, SourceUnavailable)):
        AddressGuard().addresses(host, 443)
