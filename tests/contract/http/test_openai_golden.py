"""The bytes of the HTTP APIs, as tests/golden/openai has them: `make golden` writes these again."""

from pathlib import Path

import pytest

from tests.golden.openai.script import CASES, PATHS, answer_of, joined, of_api, path_of, transcript


@pytest.mark.parametrize("endpoint", PATHS)
async def test_transcripts_are_the_recorded_ones(endpoint: str, tmp_path: Path) -> None:
    """The answers of an API have the recorded bytes, but for ids and time."""
    answers = {name: await transcript(case, tmp_path) for name, case in of_api(endpoint).items()}
    assert joined(answers).decode() == path_of(endpoint).read_text()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.body.get("stream")])
async def test_what_is_written_at_once_has_the_same_bytes(name: str, tmp_path: Path) -> None:
    """Deltas that are written past the stream's task leave the transcript as it is."""
    assert await transcript(CASES[name], tmp_path, direct=True) == answer_of(name)
