"""The cards of this machine: whether torch finds them, and one start at a time on each.

A replica plans with the memory that is free, which another start takes too.
"""

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import structlog
import torch

from loramux_shared.faults import SettingsInvalid
from loramux_shared.process import report
from loramux_shared.settings import InferenceSettings

log = structlog.get_logger()

READABLE: Final = 0o444
"""Mode of a lock's file: a reader may lock it, so that other users' starts wait as well."""


def device_of(settings: InferenceSettings) -> torch.device:
    """Return the device that a replica computes on; raise SettingsInvalid where it is not there."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        why = why_no_card(driver_version(), torch.version.cuda)
        raise SettingsInvalid(
            f"LORAMUX_DEVICE=cuda, but torch finds no CUDA device: {why}. Or set auto or cpu."
        )
    requested = settings.device == "cuda" or (settings.device == "auto" and settings.backend != "native")
    cuda = requested and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def driver_version(root: Path = Path("/")) -> str | None:
    """Return the version of NVIDIA's driver; None where none is loaded. root holds the folder proc."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else None


def why_no_card(driver: str | None, cuda: str | None) -> str:
    """Return why torch, which was built for a version of CUDA or for none, finds no card, and the cure."""
    if cuda is None:
        return f"torch {torch.__version__} was built without CUDA; install a build for CUDA"
    if driver is None:
        return "no NVIDIA driver is there; install it, or run the container with --gpus"
    return (
        f"NVIDIA driver {driver} is too old for CUDA {cuda}, torch's, or CUDA_VISIBLE_DEVICES "
        "hides the cards; update the driver, or install a torch for an older CUDA"
    )


def cards_of(settings: InferenceSettings) -> list[str]:
    """Return the UUIDs of the cards that a replica computes on; a CPU has none."""
    if device_of(settings).type != "cuda":
        return []
    count = min(settings.tensor_parallel or 1, torch.cuda.device_count())
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(count)]


@contextmanager
def sole_start(cards: Sequence[str], folder: Path | None = None) -> Iterator[None]:
    """Wait until no other start has one of these cards, and hold them.

    A lock is free when its process ends, however that ends. Where its file in the folder, by default that of
    temporary files, cannot be opened, a warning says so, and nothing is held.
    """
    place = folder or Path(tempfile.gettempdir())
    with ExitStack() as held:
        for card in sorted(cards):  # in one order, so that no two starts wait for each other
            held.enter_context(_lock(card, place / f"loramux-card-{card}.lock"))
        yield


@contextmanager
def _lock(card: str, path: Path) -> Iterator[None]:
    with ExitStack() as held:
        try:
            descriptor = _open(path)
            held.callback(os.close, descriptor)
            _wait(descriptor, card)
            held.callback(
                fcntl.flock, descriptor, fcntl.LOCK_UN
            )  # also for children that were forked meanwhile
        except OSError as error:
            log.warning("starts on a card cannot wait for each other", card=card, why=error.strerror)
        yield


def _wait(descriptor: int, card: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("another replica starts on this card: waiting until it has its memory", card=card)
        report("waiting for another start on this card")
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _open(path: Path) -> int:
    """Open the file of a lock, or make it. No link is followed, and no pipe is waited for."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        # Without O_CREAT: Linux may refuse that for another user's file in a folder of temporary files.
        return os.open(path, flags)
    except FileNotFoundError:
        descriptor = os.open(path, flags | os.O_CREAT, READABLE)
    if os.fstat(descriptor).st_uid == os.geteuid():
        os.fchmod(descriptor, READABLE)  # whatever the umask is
    return descriptor
