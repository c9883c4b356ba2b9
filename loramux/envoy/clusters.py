"""Envoy's view of the replicas: who is well, who answers which model, what a connection may hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from loramux.envoy.fleet import Fleet, Place, Tls
from loramux_shared.rpc.options import IDLE_S, PING_TIMEOUT_S

Json = dict[str, Any]

TYPE: Final = "type.googleapis.com/envoy.extensions"
HTTP_OPTIONS: Final = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
UNBOUNDED: Final = 65536
"""Of a circuit breaker: replicas say themselves when they are full, by name."""
BALANCE_PERCENT: Final = 124
"""What a replica may have of the mean of all, before the next one gets the rest of its models."""
RING_SIZE: Final = 16384
"""Places on the ring: with ten replicas, their parts differ by some percent."""
BUFFER_BYTES: Final = 256 * 1024
"""Of an answer that its client does not read; then its replica waits, and cuts it off as without Envoy."""
STREAM_WINDOW_BYTES: Final = 64 * 1024
CONNECTION_WINDOW_BYTES: Final = 64 * 1024 * 1024
"""A thousand streams that nobody reads hold up no other stream of the connection."""
HTTP_IDLE_S: Final = 30
"""A replica closes a connection that has been unused for 65 s; Envoy does so first."""


@dataclass(frozen=True)
class _Door:
    """What is different between the two doors of replicas."""

    name: str
    protocol: Json
    alpn: str
    idle_s: int
    check: Json


_GRPC: Final = _Door(
    "replicas_grpc",
    protocol={
        "http2_protocol_options": {
            "initial_stream_window_size": STREAM_WINDOW_BYTES,
            "initial_connection_window_size": CONNECTION_WINDOW_BYTES,
            "connection_keepalive": {"interval": f"{PING_TIMEOUT_S}s", "timeout": f"{PING_TIMEOUT_S}s"},
        }
    },
    alpn="h2",
    idle_s=IDLE_S // 2,
    check={"grpc_health_check": {}},
)
_HTTP: Final = _Door(
    "replicas_http",
    protocol={"http_protocol_options": {}},
    alpn="http/1.1",
    idle_s=HTTP_IDLE_S,
    check={"http_health_check": {"path": "/health"}},
)


def grpc_cluster(fleet: Fleet) -> Json:
    """Return the gRPC doors."""
    return _cluster(_GRPC, [(replica.grpc, replica.ring_key) for replica in fleet.replicas], fleet.tls)


def http_cluster(fleet: Fleet) -> Json:
    """Return the HTTP doors."""
    return _cluster(_HTTP, [(replica.http, replica.ring_key) for replica in fleet.replicas], fleet.tls)


def _cluster(door: _Door, hosts: Sequence[tuple[Place, str | None]], tls: Tls | None) -> Json:
    return {
        "name": door.name,
        **(RESOLVED if any(place.is_name for place, _ in hosts) else {"type": "STATIC"}),
        "connect_timeout": "1s",
        "per_connection_buffer_limit_bytes": BUFFER_BYTES,
        "lb_policy": "RING_HASH",
        "ring_hash_lb_config": {"minimum_ring_size": RING_SIZE},
        "common_lb_config": {
            "healthy_panic_threshold": {"value": 0},
            "update_merge_window": "0s",  # else threads hear of a replica's end a second late
            "consistent_hashing_lb_config": {"hash_balance_factor": BALANCE_PERCENT},
        },
        "health_checks": [HEALTH | door.check],
        "outlier_detection": OUTLIERS,
        "circuit_breakers": {"thresholds": [dict.fromkeys(BREAKERS, UNBOUNDED)]},
        **_connections(door),
        **({"transport_socket": _tls(tls, door.alpn)} if tls is not None else {}),
        "load_assignment": {
            "cluster_name": door.name,
            "endpoints": [{"lb_endpoints": [_endpoint(*host) for host in hosts]}],
        },
    }


RESOLVED: Final[Json] = {
    "cluster_type": {
        "name": "envoy.cluster.dns",
        "typed_config": {
            "@type": f"{TYPE}.clusters.dns.v3.DnsCluster",
            "dns_refresh_rate": "1s",
            "dns_lookup_family": "V4_PREFERRED",
        },
    }
}
BREAKERS: Final = ("max_connections", "max_pending_requests", "max_requests", "max_retries")
OUTLIERS: Final[Json] = {
    # Only what a replica does not say itself: no connection, a reset, or no token in time.
    "split_external_local_origin_errors": True,
    "consecutive_local_origin_failure": 3,
    "enforcing_consecutive_local_origin_failure": 100,
    "enforcing_local_origin_success_rate": 0,
    "enforcing_consecutive_5xx": 0,
    "enforcing_consecutive_gateway_failure": 0,
    "enforcing_success_rate": 0,
    "interval": "1s",
    "base_ejection_time": "10s",
    "max_ejection_time": "60s",
    "max_ejection_percent": 50,
    "successful_active_health_check_uneject_host": False,
}


HEALTH: Final[Json] = {
    "timeout": "2s",
    "interval": "1s",
    "no_traffic_interval": "1s",
    "unhealthy_threshold": 2,
    "healthy_threshold": 1,
}


def _connections(door: _Door) -> Json:
    options = {
        "@type": f"type.googleapis.com/{HTTP_OPTIONS}",
        "common_http_protocol_options": {"idle_timeout": f"{door.idle_s}s"},
        "explicit_http_config": door.protocol,
    }
    keepalive = {"keepalive_time": 30, "keepalive_interval": 10, "keepalive_probes": 3}
    return {
        "upstream_connection_options": {"tcp_keepalive": keepalive},
        "typed_extension_protocol_options": {HTTP_OPTIONS: options},
    }


def _endpoint(place: Place, key: str | None) -> Json:
    address = {"address": place.host, "port_value": place.port}
    endpoint: Json = {"endpoint": {"address": {"socket_address": address}}}
    return endpoint | ({"metadata": {"filter_metadata": {"envoy.lb": {"hash_key": key}}}} if key else {})


def _tls(tls: Tls, alpn: str) -> Json:
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"{TYPE}.transport_sockets.tls.v3.UpstreamTlsContext",
            "sni": tls.name,
            "common_tls_context": {
                "alpn_protocols": [alpn],
                "validation_context": {
                    "trusted_ca": {"filename": tls.ca},
                    "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": tls.name}}],
                },
            },
        },
    }
