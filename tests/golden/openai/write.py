"""Write the transcripts of the HTTP APIs."""

import asyncio
import tempfile
from pathlib import Path

from tests.golden.openai.script import CASES, path_of, transcript

if __name__ == "__main__":
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as made:
            path_of(name).write_bytes(asyncio.run(transcript(case, Path(made))))
