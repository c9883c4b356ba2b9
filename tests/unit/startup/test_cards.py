"""Starts on one card, each of which waits for the one before."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event

import pytest
import torch
from structlog.testing import capture_logs

from inference_service.startup.cards import cards_of, device_of, driver_version, sole_start, why_no_card
from loramux_shared.faults import SettingsInvalid
from loramux_shared.process import hearing
from loramux_shared.settings import InferenceSettings

BOUND_S = 60.0


def test_a_start_waits_for_the_one_on_its_card(tmp_path: Path) -> None:
    """The second start goes on when the first one ends; it says once that it waits, and for which card."""
    waits, holds = Event(), Event()

    def start() -> None:
        with sole_start(["c", "b"], tmp_path):
            holds.set()

    first = ExitStack()
    with first, capture_logs() as logs, hearing(lambda _: waits.set()), ThreadPoolExecutor(1) as thread:
        first.enter_context(sole_start(["b", "a"], tmp_path))
        done = thread.submit(start)
        assert waits.wait(BOUND_S)
        assert not holds.is_set()
        first.close()
        done.result(BOUND_S)
    assert holds.is_set()
    assert [entry["card"] for entry in logs] == ["b"]


def test_starts_on_other_cards_do_not_wait(tmp_path: Path) -> None:
    """Each card has a lock of its own, which is free again after a start that failed."""
    with capture_logs() as logs:
        with pytest.raises(ZeroDivisionError), sole_start(["a"], tmp_path), sole_start(["b"], tmp_path):
            raise ZeroDivisionError
        with sole_start(["a", "b"], tmp_path):
            pass
    assert not logs


def test_other_users_can_lock_a_card(tmp_path: Path) -> None:
    """The file of a lock can be read by all, whatever the umask is, and written by none."""
    before = os.umask(0o077)
    try:
        with sole_start(["a"], tmp_path):
            [path] = tmp_path.iterdir()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o444


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """A start goes on without a lock that is no file of its own, and warns."""
    (tmp_path / "loramux-card-a.lock").symlink_to(tmp_path / "elsewhere")
    with capture_logs() as logs, sole_start(["a"], tmp_path):
        assert not (tmp_path / "elsewhere").exists()
    assert [(entry["log_level"], entry["card"]) for entry in logs] == [("warning", "a")]


def test_a_cpu_has_no_card_to_wait_for() -> None:
    """Replicas on a CPU start side by side."""
    assert cards_of(InferenceSettings(deployment="none", device="cpu")) == []


NVRM = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12"
)


def test_the_driver_is_read_where_it_is_loaded(tmp_path: Path) -> None:
    """The version is the kernel module's; without one there is none."""
    assert driver_version(tmp_path) is None
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(NVRM)
    assert driver_version(tmp_path) == "535.104.05"


@pytest.mark.parametrize(
    ("driver", "cuda", "why"),
    [
        ("535.104.05", None, "built without CUDA; install a build for CUDA"),
        (None, "12.8", "no NVIDIA driver is there"),
        ("535.104.05", "12.8", "driver 535.104.05 is too old for CUDA 12.8"),
    ],
)
def test_a_card_that_is_not_found_has_a_reason(driver: str | None, cuda: str | None, why: str) -> None:
    """Each reason has its own cure."""
    assert why in why_no_card(driver, cuda)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_start_that_wants_a_card_says_why_it_finds_none() -> None:
    """The refusal names the setting, the reason and the values to set."""
    with pytest.raises(
        SettingsInvalid, match=r"^LORAMUX_DEVICE=cuda, .*: .* (install|update) .* auto or cpu\.$"
    ):
        device_of(InferenceSettings(deployment="none", device="cuda"))
