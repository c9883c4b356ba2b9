"""The whole configuration, as YAML."""

from typing import Any, Final

import yaml

from loramux_envoy.clusters import TYPE, answer_clusters, grpc_cluster, http_cluster
from loramux_envoy.fleet import Fleet
from loramux_envoy.listeners import grpc_listener, http_listener, inner_listener

HEAD: Final = """\
# Envoy before replicas of one deployment, as `loramux envoy` prints it; docs/guides/fleet.md says what it does.
"""
MAX_CONNECTIONS: Final = 16384


class _Dumper(yaml.SafeDumper):
    """Writes programs line by line, and repeats what occurs twice."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 - yaml's signature
        """Never refer to another place."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def render(fleet: Fleet) -> str:
    """Return the configuration; the same fleet has the same text."""
    return HEAD + yaml.dump(configuration(fleet), Dumper=_Dumper, sort_keys=False, width=120)


def configuration(fleet: Fleet) -> dict[str, Any]:
    """Return the configuration as Envoy's bootstrap."""
    monitor = {
        "name": "envoy.resource_monitors.global_downstream_max_connections",
        "typed_config": {
            "@type": f"{TYPE}.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
            "max_active_downstream_connections": MAX_CONNECTIONS,
        },
    }
    admin = {"address": "127.0.0.1", "port_value": fleet.admin_port}
    listeners = [grpc_listener(fleet), http_listener(fleet)]
    clusters = [grpc_cluster(fleet), http_cluster(fleet)]
    if fleet.is_watched:
        listeners += [inner_listener(fleet, number) for number in range(len(fleet.replicas))]
        clusters += answer_clusters(fleet)
    return {
        "admin": {"address": {"socket_address": admin}},
        "overload_manager": {"resource_monitors": [monitor]},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    }
