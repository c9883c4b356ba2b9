"""The cache of compiled operations is private, and foreign or damaged files never run."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from inference_service.core.computing import Lack
from inference_service.engine.kernels.cpu import build, compiling
from inference_service.engine.kernels.cpu.build import DIGEST_SIZE, Built, load
from inference_service.engine.kernels.cpu.check import first_wrong
from inference_service.engine.kernels.cpu.compiling import kinds_that_run
from inference_service.startup.choose import check_triton_cache
from loramux_shared.faults import SettingsInvalid
from loramux_shared.process import open_folder, private_folder, read_private
from tests.support.native import as_in_a_wheel
from tests.support.root import ROOT

COMPILER = shutil.which("c++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
OTHER_USER = 12345


@pytest.fixture(scope="module", autouse=True)
def _nothing_beforehand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hide everything beside the source, so that a start has to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "BEFOREHAND", tmp_path_factory.mktemp("nothing"))
        yield


@pytest.fixture(scope="module")
def compiler(native_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick compiler that copies the library of the real one."""
    made = native_folder / f"ops-{build.key_of(str(COMPILER))}.sealed"
    folder = tmp_path_factory.mktemp("compiler")
    (folder / "made.so").write_bytes(made.read_bytes()[DIGEST_SIZE:])
    script = f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ncp {folder}/made.so "$2"\n'
    (folder / "quick").write_text(script)
    (folder / "quick").chmod(0o755)
    return folder / "quick"


@pytest.fixture(scope="module")
def first_start(compiler: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first") / "native"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", str(compiler))
        assert load(folder).how == "compiled with quick"
    return folder


@pytest.fixture
def retained(first_start: Path, compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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
    assert built.library is not None, built.how
    assert first_wrong(built.library) is None


def sealed(code: bytes) -> bytes:
    """Return the file of an attacker, with a digest that fits the code."""
    return hashlib.sha256(code).digest() + code


def script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


@needs_compiler
def test_what_was_compiled_from_another_header_is_not_used(
    retained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's name has the digest of all that is compiled, not of ops.cpp alone."""
    source = tmp_path / "source"
    source.mkdir()
    for path in compiling.SOURCE.parent.glob("*.[ch]*"):
        shutil.copy(path, source)
    monkeypatch.setattr(compiling, "SOURCE", source / compiling.SOURCE.name)
    assert_works(load(retained.parent))
    assert len(list(retained.parent.iterdir())) == 1
    with (source / "vectors.h").open("a") as header:
        header.write("// another\n")
    assert_works(load(retained.parent))
    assert len(list(retained.parent.iterdir())) == 2


@needs_compiler
def test_what_is_kept_is_closed_to_others_and_serves_the_next_start(retained: Path) -> None:
    """Modes are 0700 and 0600, also where the folder was left open; the next start rebuilds nothing."""
    assert retained.stat().st_mode & 0o777 == 0o600
    retained.parent.chmod(0o775)
    before = retained.stat().st_ino
    assert_works(load(retained.parent))
    assert retained.parent.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_ino for path in retained.parent.iterdir()] == [before]


def test_beforehand_each_part_is_compiled_once_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kinds of processors share a part that is the same for them; a line says when each part is done."""
    calls = tmp_path / "calls"
    made_of = ('while [ "$1" != -o ]; do shift; done', ': > "$2"')
    monkeypatch.setenv("CXX", str(script(tmp_path / "counting", f'echo "$*" >> {calls}', *made_of)))
    lines: list[str] = []
    libraries = compiling.compile_beforehand(tmp_path / "made", lines.append)
    assert all(path.is_file() for path in libraries)
    compiled = [line.partition(" -o ")[0] for line in calls.read_text().splitlines() if " -c " in line]
    assert len(set(compiled)) == len(compiled) <= 2 * len(libraries)
    if len(libraries) > 1:
        assert len(compiled) < 2 * len(libraries)
    assert lines[0].startswith(f"compiling {len(compiled)} parts, ")
    assert [line.split(",")[0] for line in lines[1:]] == [
        f"compiled {done} of {len(compiled)} parts" for done in range(1, len(compiled) + 1)
    ]
    calls.unlink()
    assert compiling.compile_beforehand(tmp_path / "made") == libraries
    assert not calls.exists()


@needs_compiler
def test_folders_of_starts_that_were_killed_are_removed(retained: Path) -> None:
    """A start removes the folders of killed starts, and leaves a folder that may still be in use."""
    old, new = (retained.parent / f"{build.UNFINISHED}{age}" for age in ("old", "new"))
    for folder in (old, new):
        folder.mkdir()
        (folder / "ops.so").touch()
    day_before = time.time() - build.LEFT_BEHIND_S - 1
    os.utime(old, (day_before, day_before))
    assert_works(load(retained.parent))
    assert {path.name for path in retained.parent.iterdir()} == {retained.name, new.name}


@needs_compiler
def test_what_is_no_whole_file_is_made_again(retained: Path) -> None:
    """One that a full disk cut would kill the process; a folder in its place stops nobody."""
    size = retained.stat().st_size
    retained.write_bytes(retained.read_bytes()[:4096])
    assert_works(load(retained.parent))
    assert retained.stat().st_size == size
    retained.unlink()
    retained.mkdir()
    assert_works(load(retained.parent))


@needs_compiler
def test_a_library_that_others_could_have_put_there_does_not_run(
    retained: Path, canary: tuple[bytes, Path]
) -> None:
    """A foreign library does not run, be it beside the cached file or in its place with a digest that fits."""
    code, sung = canary
    retained.with_name(retained.name.replace("sealed", "so")).write_bytes(code)
    retained.write_bytes(sealed(code))
    retained.chmod(0o666)
    assert_works(load(retained.parent))
    assert not sung.exists()
    ctypes.CDLL(str(sung.with_name("canary.so")))
    assert sung.exists()


@needs_compiler
def test_in_a_folder_of_others_nothing_is_kept_or_run(retained: Path, canary: tuple[bytes, Path]) -> None:
    """The operations are made for this start alone, and its line says why."""
    code, _ = canary
    retained.write_bytes(sealed(code))
    link = retained.parent.with_name("link")
    link.symlink_to(retained.parent)
    result = load(link)
    assert_works(result)
    assert f"not kept: {link} is a link" in result.how
    assert retained.read_bytes() == sealed(code)


def test_a_compiler_that_fails_for_one_type_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start line has the line with the error, and the process for the other type is gone."""
    lines = [f"echo $$ >>{tmp_path}/began", "case $* in *ONLY_FLOAT32*)"]
    lines += [f"while [ $(wc -l <{tmp_path}/began) -lt 2 ]; do sleep 0.01; done"]
    lines += [
        f"echo '{line}' >&2" for line in ("a.h: warning: odd", "a.h: fatal error: omp.h is missing", "end")
    ]
    monkeypatch.setenv("CXX", str(script(tmp_path / "half", *lines, "exit 1;; esac", "exec sleep 100")))
    built = load(tmp_path / "native")
    assert built.how == "torch operations (half failed: a.h: fatal error: omp.h is missing)"
    assert built.lack == Lack.NOT_COMPILED
    for process in (tmp_path / "began").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)


def test_a_start_that_compiles_says_what_it_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that compiles says at once, and again, how long that takes and what is next; no deadline."""
    release = tmp_path / "release"
    slow = script(
        tmp_path / "slow", f"while [ ! -e {release} ]; do sleep 0.01; done", "echo enough >&2; exit 1"
    )
    texts: list[str] = []

    def report(text: str) -> None:
        texts.append(text)
        if len(texts) == 4:
            release.touch()

    monkeypatch.setattr(compiling, "INTERVAL_S", 0.02)
    monkeypatch.setattr(build, "report", report)
    monkeypatch.setenv("CXX", str(slow))
    with capture_logs() as logs:
        assert load(tmp_path / "native").how == "torch operations (slow failed: enough)"
    assert texts[0] == f"compiling operations for this processor, once: {build.COMPILING}"
    assert texts[1].endswith(f" s so far; {build.COMPILING}")
    assert "next: " in build.COMPILING
    assert logs[0] | {"waits_for": str(slow)} == logs[0]
    assert [log["event"] for log in logs[1:4]] == ["still compiling operations for this processor"] * 3


@pytest.fixture
def forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that leaves a file behind when it is called, and that file."""
    called = tmp_path / "called"
    monkeypatch.setenv("CXX", str(script(tmp_path / "forbidden", f"touch {called}", "exit 1")))
    return called


def test_a_start_compiles_nothing_where_the_wheel_has_the_best_kind(
    beforehand: Path, forbidden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start loads the wheel's library in place, and writes nothing to the cache."""
    kinds = kinds_that_run()
    if not kinds:
        pytest.skip("no kind of processor that a wheel knows")
    as_in_a_wheel(monkeypatch)
    built = load(tmp_path / "native", beforehand)
    assert_works(built)
    assert built.how == f"compiled beforehand for {kinds[0].name}"
    assert not forbidden.exists()
    assert not (tmp_path / "native").exists()


def test_a_lesser_kind_is_taken_where_the_best_can_be_had_in_no_way(
    beforehand: Path, forbidden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start compiles for this processor before it takes a library for a lesser kind."""
    kinds = kinds_that_run()
    if len(kinds) < 2:
        pytest.skip("the processor is of one kind at most")
    as_in_a_wheel(monkeypatch)
    lesser = tmp_path / "lesser"
    lesser.mkdir()
    shutil.copy(compiling.place(beforehand, kinds[1]), lesser)
    assert load(tmp_path / "native", lesser).how == f"compiled beforehand for {kinds[1].name}"
    assert forbidden.exists()


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing compiler is no error, and the start line names the fallback."""
    as_in_a_wheel(monkeypatch)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    built = load(tmp_path, tmp_path)
    assert (built.library, built.lack) == (None, Lack.NO_COMPILER)
    assert "no C++ compiler" in built.how


@needs_compiler
def test_operations_that_compute_something_else_are_not_used(
    retained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start continues with torch's, and knows why."""
    monkeypatch.setattr(build, "first_wrong", lambda _: "rms_norm")
    built = load(retained.parent)
    assert (built.library, built.lack) == (None, Lack.WRONG_RESULT)
    assert "rms_norm" in built.how


def test_what_compiles_needs_nothing_that_is_installed() -> None:
    """The module that compiles imports no installed package, as an installation has none."""
    code = "import sys; sys.path.append(sys.argv[1]); import inference_service.engine.kernels.cpu.compiling"
    subprocess.run([sys.executable, "-I", "-S", "-c", code, str(ROOT)], check=True)


@needs_compiler
def test_a_library_without_the_operations_is_reported(canary: tuple[bytes, Path]) -> None:
    """The check that every start makes before anything else uses the library."""
    assert first_wrong(ctypes.CDLL(str(canary[1].with_name("canary.so")))) == "library"


def test_only_files_that_nobody_else_can_write_are_read(tmp_path: Path) -> None:
    """Links, folders, pipes, and files that others can write are not read."""
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
    """A file of another owner is not used, whatever its mode; a folder is not taken over either."""
    file = tmp_path / "folder" / "file"
    assert private_folder(file.parent) is None
    file.write_bytes(b"code")
    os.chown(file, OTHER_USER, OTHER_USER)
    os.chown(file.parent, OTHER_USER, OTHER_USER)
    assert read_private(file) is None
    assert private_folder(file.parent) == open_folder(file.parent) == f"belongs to user {OTHER_USER}"
    assert file.parent.stat().st_uid == OTHER_USER


def test_triton_does_not_run_what_others_may_have_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton loads libraries of its cache unverified, so a folder that others can write is refused."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    check_triton_cache()
    cache.mkdir(mode=0o755)
    check_triton_cache()
    cache.chmod(0o777)
    with pytest.raises(SettingsInvalid, match=r"TRITON_CACHE_DIR=.*open to others for writing"):
        check_triton_cache()
