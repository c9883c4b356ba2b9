"""The archive of a tokenizer, for a gateway that makes tokens of text itself."""

import asyncio
import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from inference_service.text.text import Text
from loramux_shared.untrusted_json import parse_json
from loramux_vllm_grpc.base_files import BaseFiles

CHUNK: Final = 64 * 1024
"""Bytes of a message, as other servers have it."""
CACHED: Final = 4
"""Archives that are kept: of the base, and of adapters that bring chat templates or tokens."""
TEMPLATE: Final = "chat_template.jinja"
CONFIG: Final = "tokenizer_config.json"
TOKENIZER: Final = "tokenizer.json"
EPOCH: Final = (1980, 1, 1, 0, 0, 0)
"""Date of every file: equal tokenizers have equal archives, on every replica."""


@dataclass(frozen=True)
class Archive:
    """A zip archive."""

    data: bytes
    sha256: str

    def chunks(self) -> Iterator[tuple[bytes, str]]:
        """Yield its bytes in pieces; with the last one comes its digest, with others nothing."""
        for start in range(0, len(self.data), CHUNK):
            last = start + CHUNK >= len(self.data)
            yield self.data[start : start + CHUNK], self.sha256 if last else ""


class Archives:
    """Archives of a base's tokenizer, made on request, one at a time, and cached."""

    def __init__(self, files: BaseFiles) -> None:
        self.files = files
        self._kept: dict[tuple[str, Text | None], Archive] = {}
        self._making = asyncio.Lock()

    async def get(self, template: str = "", text: Text | None = None) -> Archive:
        """Return the archive with a chat template, and with tokens, in place of the base's own.

        Raises:
            CheckpointInvalid: the base's files are not there any more, or are others.
        """
        async with self._making:
            key = template, text
            if key not in self._kept:
                made = await asyncio.to_thread(self._make, template, text)
                while len(self._kept) >= CACHED:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = made
            return self._kept[key]

    def _make(self, template: str, text: Text | None) -> Archive:
        files = dict(self.files.read())
        if text is not None:
            files[TOKENIZER] = text.tokenizer_json().encode()
        if template:
            files[TEMPLATE] = template.encode()
            config = parse_json(files.get(CONFIG, b"{}"))
            files[CONFIG] = json.dumps(config | {"chat_template": template}, ensure_ascii=False).encode()
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(files):
                entry = zipfile.ZipInfo(name, EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, files[name])
        data = made.getvalue()
        return Archive(data, hashlib.sha256(data).hexdigest())
