"""Every shipped tile configuration of SGMV, through the real compiler for sm_80 and sm_90; no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from inference_service.kernels.sgmv.tuning import ARCHITECTURES, EXPAND, SHRINK

PORTABLE_SHARED = 99 * 1024
"""Bytes that a program may have on every architecture from sm_80 on (163 KB on sm_80, 227 KB on sm_90)."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_configuration_spills_or_exceeds_shared_memory(architecture: int, tmp_path: Path) -> None:
    """ptxas reports no stack and portable shared memory for every entry of the tables."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("sgmv_aot.py")
    printed = subprocess.run(
        [sys.executable, script, str(architecture)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    reports = [json.loads(line) for line in printed.splitlines()]

    shipped = sum(len(b) for table in (SHRINK, EXPAND) for b in table[architecture].values())
    assert len(reports) == shipped
    assert [r for r in reports if r["STACK"] != 0 or r["shared"] > PORTABLE_SHARED] == []
