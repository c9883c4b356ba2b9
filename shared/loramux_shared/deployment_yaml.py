"""The YAML of a deployment file."""

from pathlib import Path
from typing import Any

import yaml

from loramux_shared.faults import DeploymentInvalid


class _Loader(yaml.SafeLoader):
    """YAML without duplicate keys, of which PyYAML silently keeps the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"{key.value!r} appears twice", key.start_mark
                    )
                seen.add(key.value)
        return node


def parse_yaml(text: str, path: Path) -> Any:
    """Return what a text says; raise DeploymentInvalid where it is no YAML, or has a key twice."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a safe loader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", "") or getattr(error, "reason", "") or "cannot be parsed"
        raise DeploymentInvalid(f"{path} is not valid YAML{line}: {problem}") from error
    except (ValueError, RecursionError) as error:  # 2024-99-99; thousands of brackets
        raise DeploymentInvalid(f"{path} is not valid YAML: {error}") from error
