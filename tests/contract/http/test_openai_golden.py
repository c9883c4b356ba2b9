"""The bytes of the HTTP APIs, as tests/golden/openai has them: `make golden` writes these again."""

from pathlib import Path

import pytest

from tests.golden.openai.script import CASES, path_of, transcript


@pytest.mark.parametrize("name", CASES)
async def test_transcripts_are_the_kept_ones(name: str, tmp_path: Path) -> None:
    """An answer has the recorded bytes, but for ids and time."""
    assert await transcript(CASES[name], tmp_path) == path_of(name).read_bytes()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.body.get("stream")])
async def test_what_is_written_at_once_has_the_same_bytes(name: str, tmp_path: Path) -> None:
    """Deltas that are written past the stream's task leave the transcript as it is."""
    assert await transcript(CASES[name], tmp_path, direct=True) == path_of(name).read_bytes()
