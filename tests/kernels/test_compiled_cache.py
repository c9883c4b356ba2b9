"""Compiled operations are kept where nobody else can write, and what is not ours or not whole never runs."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from inference_service.kernels.cpu import build
from inference_service.kernels.cpu.build import DIGEST_SIZE, Built, load
from inference_service.kernels.cpu.check import first_wrong
from inference_service.startup.choose import check_triton_cache
from loramux_shared.faults import SettingsInvalid
from loramux_shared.private import open_folder, private_folder, read_private

COMPILER = shutil.which("c++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
STRANGER = 12345


@pytest.fixture(scope="module")
def compiler(native_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that is quick: it hands out what the real one made."""
    (made,) = native_folder.iterdir()
    folder = tmp_path_factory.mktemp("compiler")
    (folder / "made.so").write_bytes(made.read_bytes()[DIGEST_SIZE:])
    script = f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ncp {folder}/made.so "$2"\n'
    (folder / "quick").write_text(script)
    (folder / "quick").chmod(0o755)
    return folder / "quick"


@pytest.fixture(scope="module")
def first_start(compiler: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a first start leaves."""
    folder = tmp_path_factory.mktemp("first") / "native"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", str(compiler))
        assert load(folder).how == "compiled with quick"
    return folder


@pytest.fixture
def kept(first_start: Path, compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one file in a folder after a first start; later ones try nothing out in a process."""
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    (file,) = shutil.copytree(first_start, tmp_path / "native").iterdir()
    return file


@pytest.fixture
def canary(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    """A library that leaves a file behind when it is loaded, and that file; each test has its own."""
    folder = tmp_path_factory.mktemp("canary")
    source = f'#include <cstdio>\n__attribute__((constructor)) void sing() {{ fopen("{folder}/sung", "w"); }}\n'
    (folder / "canary.cpp").write_text(source)
    subprocess.run(
        [str(COMPILER), "-shared", "-fPIC", str(folder / "canary.cpp"), "-o", str(folder / "canary.so")],
        check=True,
    )
    return (folder / "canary.so").read_bytes(), folder / "sung"


def assert_works(built: Built) -> None:
    """The operations are there, and right."""
    assert built.library is not None, built.how
    assert first_wrong(built.library) is None


def sealed(code: bytes) -> bytes:
    """What a stranger who has read the source writes: the digest fits."""
    return hashlib.sha256(code).digest() + code


@needs_compiler
def test_what_was_compiled_from_another_header_is_not_used(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's name has the digest of all that is compiled, not of ops.cpp alone."""
    source = tmp_path / "source"
    source.mkdir()
    for path in build.SOURCE.parent.glob("*.[ch]*"):
        shutil.copy(path, source)
    monkeypatch.setattr(build, "SOURCE", source / build.SOURCE.name)
    assert_works(load(kept.parent))
    assert len(list(kept.parent.iterdir())) == 1
    with (source / "vectors.h").open("a") as header:
        header.write("// another\n")
    assert_works(load(kept.parent))
    assert len(list(kept.parent.iterdir())) == 2


@needs_compiler
def test_what_is_kept_is_closed_to_others_and_serves_the_next_start(kept: Path) -> None:
    """0700 and 0600, also where an older start or a umask of 002 left the folder open; nothing is made anew."""
    assert kept.stat().st_mode & 0o777 == 0o600
    kept.parent.chmod(0o775)
    before = kept.stat().st_ino
    assert_works(load(kept.parent))
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_ino for path in kept.parent.iterdir()] == [before]


@needs_compiler
def test_a_truncated_file_is_made_anew(kept: Path) -> None:
    """A start after a full disk is like the first; a library that ends early would kill the process."""
    size = kept.stat().st_size
    kept.write_bytes(kept.read_bytes()[:4096])
    assert_works(load(kept.parent))
    assert kept.stat().st_size == size


@needs_compiler
def test_a_folder_in_the_place_of_the_file_stops_nobody(kept: Path) -> None:
    """The operations are there; only the next start makes them anew."""
    kept.unlink()
    kept.mkdir()
    assert_works(load(kept.parent))


@needs_compiler
def test_a_library_that_others_could_have_put_there_does_not_run(
    kept: Path, canary: tuple[bytes, Path]
) -> None:
    """Neither beside the file that is looked for, nor in its place with a digest that fits."""
    code, sung = canary
    kept.with_name(kept.name.replace("sealed", "so")).write_bytes(code)
    kept.write_bytes(sealed(code))
    kept.chmod(0o666)
    assert_works(load(kept.parent))
    assert not sung.exists()
    ctypes.CDLL(str(sung.with_name("canary.so")))
    assert sung.exists()


@needs_compiler
def test_in_a_folder_of_others_nothing_is_kept_or_run(kept: Path, canary: tuple[bytes, Path]) -> None:
    """The operations are made for this start alone, and its line says why."""
    code, _ = canary
    kept.write_bytes(sealed(code))
    link = kept.parent.with_name("link")
    link.symlink_to(kept.parent)
    result = load(link)
    assert_works(result)
    assert f"not kept: {link} is a link" in result.how
    assert kept.read_bytes() == sealed(code)


def test_a_compiler_that_fails_for_one_type_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start line has its first words, and the process for the other type is gone."""
    lines = ["#!/bin/sh", f"echo $$ >>{tmp_path}/began", "case $* in *ONLY_FLOAT32*)"]
    lines += [f"while [ $(wc -l <{tmp_path}/began) -lt 2 ]; do sleep 0.01; done", "echo no floats >&2; exit 1"]
    half = tmp_path / "half"
    half.write_text("\n".join([*lines, ";; esac", "exec sleep 100", ""]))
    half.chmod(0o755)
    monkeypatch.setenv("CXX", str(half))
    assert load(tmp_path / "native").how == "torch operations (half failed: no floats)"
    for process in (tmp_path / "began").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)


@needs_compiler
def test_a_library_without_the_operations_is_told(canary: tuple[bytes, Path]) -> None:
    """The check that every start makes before anything else uses the library."""
    assert first_wrong(ctypes.CDLL(str(canary[1].with_name("canary.so")))) == "library"


def test_only_files_that_nobody_else_can_write_are_read(tmp_path: Path) -> None:
    """Not through a link, not from a folder or a pipe, and whose mode lets nobody else in."""
    file = tmp_path / "file"
    file.write_bytes(b"code")
    for mode, found in ((0o600, b"code"), (0o755, b"code"), (0o620, None), (0o602, None)):
        file.chmod(mode)
        assert read_private(file) == found
    file.chmod(0o600)
    (tmp_path / "link").symlink_to(file)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("link", "pipe", ".", "missing"):
        assert read_private(tmp_path / name) is None


@needs_root
def test_what_belongs_to_somebody_else_is_no_place_for_code(tmp_path: Path) -> None:
    """Whatever the mode; a folder is not taken over either."""
    file = tmp_path / "folder" / "file"
    assert private_folder(file.parent) is None
    file.write_bytes(b"code")
    os.chown(file, STRANGER, STRANGER)
    os.chown(file.parent, STRANGER, STRANGER)
    assert read_private(file) is None
    assert private_folder(file.parent) == open_folder(file.parent) == f"belongs to user {STRANGER}"
    assert file.parent.stat().st_uid == STRANGER


def test_triton_does_not_run_what_others_may_have_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cache holds libraries that it loads unseen, so the folder must be safe from others."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    check_triton_cache()
    cache.mkdir(mode=0o755)
    check_triton_cache()
    cache.chmod(0o777)
    with pytest.raises(SettingsInvalid, match=r"TRITON_CACHE_DIR=.*open to others for writing"):
        check_triton_cache()
