"""Configs of models as the hub has them: written by transformers 4, and by people."""

import json
from pathlib import Path
from typing import Any

HUB_CONFIGS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text())

_SLIDING, _FULL = "sliding_attention", "full_attention"
HUB_CONFIGS["Qwen3.5-9B"]["text_config"]["layer_types"] = [*["linear_attention"] * 3, _FULL] * 8
HUB_CONFIGS["gemma-4-e2b"]["text_config"]["layer_types"] = [*[_SLIDING] * 4, _FULL] * 7
HUB_CONFIGS["gpt-oss-20b"]["layer_types"] = [_SLIDING, _FULL] * 12
HUB_CONFIGS["Phi-4-mini"]["rope_scaling"] = {
    "type": "longrope", "long_factor": [*range(1, 49)], "short_factor": [1.0] * 48
}  # fmt: skip
