"""Operations of 64-bit ARM, emulated: the tests of this processor's, with adapters of all kinds beside PEFT."""

from pathlib import Path

import pytest

from tests.kernels import emulator

TESTS = (
    "tests/kernels/test_cpu_ops.py",
    "tests/kernels/test_quantized_linear.py",
    "tests/kernels/test_delta.py",
    "tests/kernels/test_expert_lora.py",
    "tests/kernels/test_lora_banks.py",
    "tests/models/test_kinds.py",
    "tests/models/test_mixtures.py",
)
OTHERS = (
    *("avx", "triton", "torch", "transformers"),  # by other kernels
    *("wheel", "another_source", "without_both", "a_processor_gets"),  # where a library comes from
    "memory_is_taken",  # of a heap that is a file
)


@pytest.mark.sweep
def test_arm_computes_what_this_processor_does(tmp_path: Path) -> None:
    """Every operation in both types, and whole models."""
    missing = emulator.missing()
    if missing:
        pytest.skip(missing)
    done = emulator.run_tests(tmp_path, [*TESTS, "-k", f"not ({' or '.join(OTHERS)})"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100%" in done.stdout
