"""docs/reference/settings.md, from the settings of the services."""

from __future__ import annotations

from loramux_shared.settings import CLIENT_VARIABLES, BuilderSettings, InferenceSettings, Settings, variable
from scripts.pages import default_of, one_line, table, type_of

HEAD = """\
# Settings

<!-- Written by scripts/settings_doc.py from shared/loramux_shared/settings.py: `make docs`. -->

Every setting is a variable `LORAMUX_*`, read once at the start. Flags of `loramux serve`, `loramux builder`
and `python -m inference_service` and `python -m builder_service` come first, then the variable, then the
default. An unknown `LORAMUX_*` variable or a bad value stops the start, with the name, the value and what is
allowed. An empty variable is one that is not set.

Lists of folders are separated by `:`, lists of hosts by commas. Secrets of sources are files of `secrets_dir`
or variables `LORAMUX_SECRET_<name>`, see [sources.md](sources.md#secrets). S3 reads the standard `AWS_*`
variables.
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
    client = [(f"`{variable(name)}`", CLIENT[name]) for name in CLIENT_VARIABLES]
    return "\n".join(
        [
            HEAD,
            "## Both services\n\n" + _settings(Settings, frozenset()),
            "## The builder\n\n" + _settings(BuilderSettings, common),
            "## The inference service\n\n" + _settings(InferenceSettings, common),
            "## Clients\n\nRead by `loramux` and `loramux.Client`.\n\n"
            + table(("variable", "meaning"), client),
        ]
    )


def _settings(kind: type[Settings], left_out: frozenset[str]) -> str:
    schema = kind.model_json_schema()
    rows = [
        (
            f"`{variable(name)}`",
            type_of(field, schema.get("$defs", {})),
            default_of(name, field, schema),
            one_line(field.get("description", "")),
        )
        for name, field in schema["properties"].items()
        if name not in left_out
    ]
    return table(("variable", "type", "default", "meaning"), rows)
