"""The bytes of the HTTP APIs, as tests/golden/openai has them: `make golden` writes these again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.openai.script import CASES, path_of, transcript


@pytest.mark.parametrize("name", CASES)
async def test_transcripts_are_the_kept_ones(name: str, tmp_path: Path) -> None:
    """An answer has the recorded bytes, but for ids and time."""
    assert await transcript(CASES[name], tmp_path) == path_of(name).read_bytes()
