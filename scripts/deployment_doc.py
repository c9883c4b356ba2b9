"""docs/reference/deployment-file.md and its JSON schema, from the model of the deployment file."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from loramux_shared import deployment, runtime
from loramux_shared.deployment import Deployment
from loramux_shared.deployment_file import IGNORED_KEYS
from scripts.pages import entry, fields_of, one_line

ROOT = Path(__file__).resolve().parent.parent
HEAD = """\
# The deployment file

<!-- Written by scripts/deployment_doc.py from shared/loramux_shared/deployment.py: `make docs`. -->

A deployment is a base checkpoint, named adapters and a few settings, in one YAML file. This one is
[examples/deployment.yaml](../../examples/deployment.yaml), whose comments explain it:

```yaml
{example}```

The `trt_llm:` block is the one of [Baseten's engine builder](../move/baseten.md), and may be left out. Without
`model_name` the deployment has the file's name. LOCAL paths are relative to the file's folder.

All mistakes of a file are reported together; an unknown key refuses it, with the nearest known key. For an
editor, put the address of your copy of [deployment.schema.json](deployment.schema.json) into the first line:
`# yaml-language-server: $schema=ADDRESS`.

[Names](openai.md#names) that stand for several models, and limits of models beside those of
[keys](../guides/access.md#limits-of-keys):

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


def page() -> str:
    """Return the page."""
    schema = explained()
    definitions = schema["$defs"]
    models = {"Deployment": schema} | {
        name: definitions[name]
        for name in (
            *("Build", "Repository", "LoraConfiguration", "Runtime"),
            *("Speculator", "ModelLimits", "Limits", "Resolve"),
        )
    }
    lines = (ROOT / "examples" / "deployment.yaml").read_text().splitlines(keepends=True)
    example = "".join(
        re.sub(r"\s+# .*\n", "\n", line) for line in lines if line.strip() and line.lstrip()[0] != "#"
    )
    parts = [HEAD.format(example=example, more=MORE)]
    for name, model in models.items():
        keys = "".join(
            f"- `{key}`{entry(key, field, model, definitions)}" for key, field in model["properties"].items()
        )
        parts.append(f"## {name}\n\n{one_line(model.get('description', ''))}\n\n{keys}")
    return "\n".join(parts)


def explained() -> dict[str, Any]:
    """Return the schema of a deployment, in which the string behind a field is its description."""
    schema = Deployment.model_json_schema()
    models = {name: model for name, model in schema["$defs"].items() if "properties" in model}
    for name, model in {"Deployment": schema, **models}.items():
        for field, meaning in fields_of(getattr(runtime, name, None) or getattr(deployment, name)):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and meaning:
                properties = model["properties"]
                properties[field.target.id] = dict(
                    sorted(({"description": meaning} | properties[field.target.id]).items())
                )
    return schema


def json_schema() -> str:
    """Return the JSON schema of a file, in both of its forms."""
    plain = explained()
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
