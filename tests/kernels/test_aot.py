"""Every shipped tile configuration of every kernel, through the real compiler; no GPU needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from inference_service.kernels.launch import ARCHITECTURES
from tests.kernels.aot import PACKAGES, variants

PORTABLE_SHARED = 99 * 1024
"""Bytes that a program may have on every architecture from sm_80 on (163 KB on sm_80, 227 KB on sm_90)."""


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_configuration_spills_or_exceeds_shared_memory(
    architecture: int, package: str, tmp_path: Path
) -> None:
    """ptxas reports no stack and portable shared memory for every entry of the tables."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    printed = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot", str(architecture), package],
        cwd=Path(__file__).parents[2],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    reports = [json.loads(line) for line in printed.splitlines()]

    names = [(variant.name, variant.dtype) for variant in variants(architecture, [package])]
    assert [(report["name"], report["dtype"]) for report in reports] == names
    assert len(set(names)) == len(names)
    assert [r for r in reports if r["STACK"] != 0 or r["shared"] > PORTABLE_SHARED] == []
