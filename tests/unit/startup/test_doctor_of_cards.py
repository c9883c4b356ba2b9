"""The doctor on a machine with a card, and with one that torch does not find."""

from pathlib import Path

import pytest
import torch

from inference_service.startup.doctor import look_at_card, risks
from loramux.cli.doctor.command import Diagnosis, show_diagnosis
from loramux.cli.doctor.machine import Inference, look_at_machine
from loramux_shared.settings import InferenceSettings

GB = 10**9
SETTINGS = InferenceSettings(deployment="none", adapter_host_gb=8)
CPU = torch.device("cpu")


def test_an_idle_card_beside_enough_memory_has_no_risk() -> None:
    """A context of CUDA's own is no other process."""
    assert risks(SETTINGS, used=GB // 2, pinned=8 * GB, host=64 * GB) == []


def test_each_risk_names_its_setting() -> None:
    """Neighbours on the card and a small host are found before anything is loaded."""
    neighbour, host = risks(SETTINGS, used=20 * GB, pinned=2 * GB, host=4 * GB)
    assert "use 20.0 GB of the card" in neighbour
    assert "LORAMUX_KV_MEMORY_GB" in neighbour
    assert host.startswith(
        "LORAMUX_ADAPTER_HOST_GB=8 is too much for 4.0 GB of free memory: 2.0 GB will be locked"
    )


def test_the_host_tier_of_all_ranks_counts() -> None:
    """Each rank locks memory of its own."""
    two = SETTINGS.model_copy(update={"tensor_parallel": 2})
    assert risks(two, used=0, pinned=16 * GB, host=64 * GB) == []
    assert len(risks(two, used=0, pinned=8 * GB, host=16 * GB)) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a GPU")
def test_a_card_that_torch_does_not_find_is_a_risk() -> None:
    """A driver without a card for torch is reported; no driver, and a CPU by request, are not."""
    [risk] = look_at_card(SETTINGS, CPU, "535.104.05")["risks"]
    assert risk.startswith("a card is not used: ")
    assert look_at_card(SETTINGS, CPU, None)["risks"] == []
    on_cpu = SETTINGS.model_copy(update={"device": "cpu"})
    assert look_at_card(on_cpu, CPU, "535.104.05")["risks"] == []


def test_the_doctor_prints_what_drives_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    """Risks come first, in the place of the verdict; driver, CUDA, Triton and locked memory are said."""
    inference = Inference(
        "cuda", "H100", 80 * GB, 60 * GB, "bfloat16", "triton", "triton kernels", "bfloat16", "", None, 2,
        "NVIDIA driver 535.104.05, torch for CUDA 12.8, Triton 3.9.0", 8 * GB, ("other processes use 20.0 GB",),
    )  # fmt: skip
    show_diagnosis(Diagnosis((), {}, (), look_at_machine(Path("/")), inference, (), None))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "risk: other processes use 20.0 GB"
    assert "nothing is wrong" not in lines
    assert "runs on      cuda: H100, 60.0 GB of 80.0 GB free, 2 threads" in lines
    assert "driven by    NVIDIA driver 535.104.05, torch for CUDA 12.8, Triton 3.9.0" in lines
    assert "locks        8.0 GB of the host's memory for adapters, at most" in lines


def test_a_containers_limit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The machine's line has the limit beside the memory."""
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    for name, text in {"max": "500000000", "current": "1000", "stat": "inactive_file 0"}.items():
        (group / f"memory.{name}").write_text(text)
    show_diagnosis(Diagnosis((), {}, (), look_at_machine(tmp_path, tmp_path), "no torch", (), None))
    assert "500.0 MB (a container's limit) of " in capsys.readouterr().out
