"""Configs of models as the hub has them: written by transformers 4, and by people."""

import json
from pathlib import Path
from typing import Any

HUB_CONFIGS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text())
