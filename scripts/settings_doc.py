"""docs/reference/settings.md, from the settings of the services."""

from __future__ import annotations

from loramux_shared.settings import CLIENT_VARIABLES, BuilderSettings, InferenceSettings, Settings, variable
from scripts.pages import entry

HEAD = """\
# Settings

<!-- Written by scripts/settings_doc.py from shared/loramux_shared/settings.py: `make docs`. -->

Every setting is a variable `LORAMUX_*`, read once at the start; an empty one is not set. A flag of `loramux
serve`, `loramux builder`, `python -m inference_service` or `python -m builder_service` comes before the
variable. An unknown variable or a bad value stops the start, with the name, the value and what is allowed.

`:` separates folders of a list, a comma separates hosts. Secrets of sources: [sources](sources.md#secrets). S3
reads the standard `AWS_*` variables.
"""
CLIENT = {
    "API_KEY": "The key that every call shows.",
    "TLS_CA": "A file of authorities (PEM) that are trusted for `grpcs://` addresses.",
    "CLIENT_CERT": "The certificate chain (PEM) that is shown to a server that asks for one.",
    "CLIENT_KEY": "Its private key (PEM).",
}


def page() -> str:
    """Return the page."""
    common = frozenset(Settings.model_fields)
    client = [(variable(name), CLIENT[name]) for name in CLIENT_VARIABLES]
    return "\n".join(
        [
            HEAD,
            "## Both services\n\n" + _settings(Settings, frozenset()),
            "## The builder\n\n" + _settings(BuilderSettings, common),
            "## The inference service\n\n" + _settings(InferenceSettings, common),
            "## Clients\n\nRead by `loramux` and `loramux.Client`.\n\n"
            + "".join(f"- `{name}`: {meaning}\n" for name, meaning in client),
        ]
    )


def _settings(kind: type[Settings], left_out: frozenset[str]) -> str:
    schema = kind.model_json_schema()
    definitions = schema.get("$defs", {})
    return "".join(
        f"- `{variable(name)}`{entry(name, field, schema, definitions)}"
        for name, field in schema["properties"].items()
        if name not in left_out
    )
