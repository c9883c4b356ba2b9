"""Processes of replicas that are killed while they load, or find no room."""

import os
import resource
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from inference_service.adapters.disk import DiskTier
from inference_service.adapters.loader import AdapterLoader
from loramux_shared.storage.local import LocalStore
from tests.support.stores.bundles import FakePacked, KeepingReader, Loaded, load


def load_until_killed(number: int, cache: Path, store: Path, limit: int, digests: Sequence[str]) -> None:
    """Load bundles, the first twice, and be killed at the n-th touch of the cache, if it comes."""
    touched = 0

    def hook(_: str, arguments: tuple[object, ...]) -> None:
        nonlocal touched
        if any(str(cache) in str(each) for each in arguments):
            touched += 1
            if touched == number:
                os.kill(os.getpid(), signal.SIGKILL)

    reader = KeepingReader(LocalStore(store), DiskTier(cache, limit))
    loader = AdapterLoader(reader, FakePacked)
    sys.addaudithook(hook)
    for digest in (*digests, digests[0]):
        load(loader, digest)
        reader.await_kept()
    os._exit(0)


def load_on_full_disk(limit: int, cache: Path, store: Path, digests: Sequence[str], text: Connection) -> None:
    """Load bundles where no file may have more bytes, and say so."""
    os.dup2(text.fileno(), 1)
    os.dup2(text.fileno(), 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    reader = KeepingReader(LocalStore(store), DiskTier(cache, 10**9))
    loader = AdapterLoader(reader, FakePacked)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for digest in digests:
        assert isinstance(load(loader, digest), Loaded)
        reader.await_kept()
    loader.close()
