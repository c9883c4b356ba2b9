"""Write the transcripts of the HTTP APIs."""

import asyncio
import tempfile
from pathlib import Path

from tests.golden.openai.script import PATHS, Case, joined, of_api, path_of, transcript


def _answer(case: Case) -> bytes:
    with tempfile.TemporaryDirectory() as made:
        return asyncio.run(transcript(case, Path(made)))


if __name__ == "__main__":
    for endpoint in PATHS:
        path_of(endpoint).write_bytes(joined({name: _answer(case) for name, case in of_api(endpoint).items()}))
