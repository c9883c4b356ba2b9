"""docs/reference/deployment-file.md and its JSON schema, from the model of the deployment file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loramux_shared.deployment import Deployment
from loramux_shared.deployment_file import IGNORED_KEYS, UNSERVED_KEYS
from scripts.pages import default_of, one_line, table, type_of

ROOT = Path(__file__).resolve().parent.parent
HEAD = """\
# The deployment file

<!-- Written by scripts/deployment_doc.py from shared/loramux_shared/deployment.py: `make docs`. -->

A deployment is a base checkpoint, named adapters and a few settings, in one YAML file. This one is
[examples/deployment.yaml](../../examples/deployment.yaml):

```yaml
{example}```

The file of a hosted engine builder works as it is: the same blocks inside a `trt_llm:` block. `model_name`
may be missing; then it is the file's name. LOCAL paths are relative to the file's folder. `max_lora_rank` may
also stand directly under `build`, as older files have it.

An unknown key refuses the file, with the nearest known key; all mistakes of a file are reported together.
Editors find mistakes with [deployment.schema.json](deployment.schema.json): put

```yaml
# yaml-language-server: $schema=https://example.com/path/to/deployment.schema.json
```

with the address of your copy into the first line.

Names that stand for several models, and limits of models, are settings of `runtime`. What requests may do with
them is in [openai.md](openai.md#names); limits of API keys are in
[access.md](../guides/access.md#limits-of-keys).

```yaml
{more}```
"""
MORE = """\
runtime:
  aliases:
    support: {support-v1: 90, support-v2: 10} # the model `support` is one of them, by weight
  limits: # of each replica
    default: {max_waiting: 64} # every model has its own 64
    models:
      support-v1: {weight: 4, max_running: 8, tokens_per_minute: 200000} # and max_waiting as above
"""
IGNORED_HEAD = """\
## Keys that mean nothing here

Files of hosted builders carry keys that loramux has no use for. They are accepted, and listed once when the
file is read. Those that ask for what is not done are warnings (`W_UNSERVED`), each with what to set instead.

"""
BLOCKS = {
    "": "beside `trt_llm`, or at the top",
    "trt_llm": "`trt_llm`",
    "build": "`build`",
    "runtime": "`runtime`",
}


def page() -> str:
    """Return the page."""
    schema = Deployment.model_json_schema()
    definitions = schema["$defs"]
    models = {"Deployment": schema} | {
        name: definitions[name]
        for name in ("Build", "Repository", "LoraConfiguration", "Runtime", "ModelLimits", "Limits")
    }
    example = (ROOT / "examples" / "deployment.yaml").read_text()
    parts = [HEAD.format(example=example, more=MORE)]
    for name, model in models.items():
        rows = [
            (f"`{key}`", type_of(field, definitions), default_of(key, field, model), _meaning(field))
            for key, field in model["properties"].items()
        ]
        said = one_line(model.get("description", ""))
        parts.append(f"## {name}\n\n{said}\n\n" + table(("key", "type", "default", "meaning"), rows))
    ignored = [
        (BLOCKS[block], ", ".join(f"`{key}`" for key in sorted(keys))) for block, keys in IGNORED_KEYS.items()
    ]
    unserved = [
        (f"`{key}`", "-" if usual is None else f"`{usual}`", fix) for key, (usual, fix) in UNSERVED_KEYS.items()
    ]
    tables = table(("block", "keys"), ignored), table(("a warning, unless", "it is", "instead"), unserved)
    return "\n".join([*parts, IGNORED_HEAD + tables[0], tables[1]])


def _meaning(field: dict[str, Any]) -> str:
    return one_line(field.get("description", "")).replace("``", "`")


def json_schema() -> str:
    """Return the JSON schema of a file, in both of its forms."""
    plain = Deployment.model_json_schema()
    definitions = plain.pop("$defs")
    definitions["Build"]["properties"]["max_lora_rank"] = definitions["LoraConfiguration"]["properties"][
        "max_lora_rank"
    ]
    for model, block in (("Build", "build"), ("Runtime", "runtime")):
        definitions[model]["properties"] |= _without_meaning(block)
    definitions["Plain"] = plain | {"required": ["build"]}
    inner = {"properties": plain["properties"] | _without_meaning("trt_llm")}
    definitions["Inner"] = plain | {"required": ["build"]} | inner
    outer = _without_meaning("") | {"model_name": plain["properties"]["model_name"]}
    wrapped = {
        "type": "object",
        "properties": outer | {"trt_llm": {"$ref": "#/$defs/Inner"}},
        "required": ["trt_llm"],
        "additionalProperties": False,
    }
    plain["properties"] |= {key: value for key, value in _without_meaning("").items() if key != "runtime"}
    plain["properties"] |= _without_meaning("trt_llm")
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "loramux deployment",
        "if": {"required": ["trt_llm"]},
        "then": wrapped,
        "else": {"$ref": "#/$defs/Plain"},
        "$defs": definitions,
    }
    return json.dumps(schema, indent=2) + "\n"


def _without_meaning(block: str) -> dict[str, dict[str, str]]:
    return {key: {"description": "Means nothing here."} for key in sorted(IGNORED_KEYS[block])}
