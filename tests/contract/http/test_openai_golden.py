"""The bytes of the OpenAI door, kept in tests/golden/openai: `make golden` rewrites them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.openai.script import CASES, path_of, transcript


@pytest.mark.parametrize("name", CASES)
async def test_transcripts_are_the_kept_ones(name: str, tmp_path: Path) -> None:
    """An answer is byte for byte what it was, but for its ids and its time."""
    assert await transcript(CASES[name], tmp_path) == path_of(name).read_bytes()
