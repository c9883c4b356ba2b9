"""``python -m tests.openapi_golden``: write the recorded OpenAPI document again."""

import json
from pathlib import Path
from typing import Final

from inference_service.http.app import ENDPOINTS
from loramux_openapi.document import ServerFacts, document
from tests.golden.openai.script import pretty

RECORDED: Final = Path(__file__).with_name("openapi.json")


def described() -> bytes:
    """Return the OpenAPI document of a server with a model of every kind."""
    return pretty(json.dumps(document(ENDPOINTS, ServerFacts("base", "scorer", "classifier"))).encode())


if __name__ == "__main__":
    RECORDED.write_bytes(described())
