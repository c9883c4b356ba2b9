"""Envoy's view of the replicas: who is well, who answers which model, what a connection may hold."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from loramux_envoy.fleet import Fleet, Place, Tls
from loramux_shared.routes import HEALTH as HEALTH_ROUTE
from loramux_shared.rpc.options import IDLE_S, PING_TIMEOUT_S

Json = dict[str, Any]

TYPE: Final = "type.googleapis.com/envoy.extensions"
HTTP_OPTIONS: Final = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
UNBOUNDED: Final = 65536
"""Limit of a circuit breaker: replicas refuse by themselves when they are full, by name."""
BALANCE_PERCENT: Final = 124
"""Largest load of a replica in percent of the mean, before the next one gets the rest of its models."""
RING_SIZE: Final = 16384
"""Places on the ring: with ten replicas, their parts differ by some percent."""
BUFFER_BYTES: Final = 256 * 1024
"""Buffer of an answer that its client does not read.

Then its replica waits, and cuts it off as without Envoy.
"""
STREAM_WINDOW_BYTES: Final = 64 * 1024
CONNECTION_WINDOW_BYTES: Final = 64 * 1024 * 1024
"""Window of a connection: a thousand unread streams block no other stream of it."""
ANSWERS: Final = "replicas_http_answers"
HTTP_IDLE_S: Final = 30
"""A replica closes a connection that has been unused for 65 s; Envoy does so first."""


@dataclass(frozen=True)
class _Api:
    """The differences between the two APIs of replicas."""

    name: str
    protocol: Json
    alpn: str
    idle_s: int
    check: Json


_GRPC: Final = _Api(
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
_HTTP: Final = _Api(
    "replicas_http",
    protocol={"http_protocol_options": {}},
    alpn="http/1.1",
    idle_s=HTTP_IDLE_S,
    check={"http_health_check": {"path": HEALTH_ROUTE.path}},
)


def grpc_cluster(fleet: Fleet) -> Json:
    """Return the cluster of gRPC endpoints."""
    return _cluster(_GRPC, [(replica.grpc, replica.ring_key) for replica in fleet.replicas], fleet.tls)


def http_cluster(fleet: Fleet) -> Json:
    """Return the cluster of HTTP endpoints."""
    return _cluster(_HTTP, [(replica.http, replica.ring_key) for replica in fleet.replicas], fleet.tls)


def answer_clusters(fleet: Fleet) -> list[Json]:
    """Return the HTTP endpoints for answers: a cluster of all replicas, and one of each behind its TCP proxy.

    HTTP/1.1 cannot check the peer while an answer is awaited. So these connections pass a TCP
    proxy, which closes them when the replica answers nothing at all, not even that it is leaving.
    """
    places = [replica.http for replica in fleet.replicas]
    hosts = [(place, replica.ring_key) for place, replica in zip(places, fleet.replicas, strict=True)]
    answers = _cluster(replace(_HTTP, name=ANSWERS), hosts, None)
    endpoints = answers["load_assignment"]["endpoints"][0]["lb_endpoints"]
    for number, endpoint in enumerate(endpoints):
        endpoint["endpoint"]["address"] = proxy_address(fleet, number)
    for name in ("cluster_type", "type", "upstream_connection_options"):
        answers.pop(name, None)
    answers["health_checks"] = [HEALTH | _HTTP.check | SOON]
    return [{"type": "STATIC"} | answers, *(_inner_cluster(place, fleet.tls) for place in places)]


def proxy_address(fleet: Fleet, number: int) -> Json:
    """Return where the TCP proxy of a replica listens: a socket of this machine, without a file."""
    return {"pipe": {"path": f"@loramux-envoy-{fleet.admin_port}-{number}"}}


def inner_name(place: Place) -> str:
    """Return the name of the TCP proxy of a replica's HTTP endpoint, and of its cluster."""
    return f"{place.host}:{place.port}"


def _inner_cluster(place: Place, tls: Tls | None) -> Json:
    whole = _cluster(replace(_HTTP, name=inner_name(place)), [(place, None)], tls)
    for name in ("lb_policy", "ring_hash_lb_config", "outlier_detection", "typed_extension_protocol_options"):
        del whole[name]
    return whole | {
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "health_checks": [STILL],
        "close_connections_on_host_health_failure": True,
    }


def _cluster(api: _Api, hosts: Sequence[tuple[Place, str | None]], tls: Tls | None) -> Json:
    return {
        "name": api.name,
        **(RESOLVED if any(place.is_name for place, _ in hosts) else {"type": "STATIC"}),
        "connect_timeout": "1s",
        "per_connection_buffer_limit_bytes": BUFFER_BYTES,
        "lb_policy": "RING_HASH",
        "ring_hash_lb_config": {"minimum_ring_size": RING_SIZE},
        "common_lb_config": {
            "healthy_panic_threshold": {"value": 0},
            "update_merge_window": "0s",  # otherwise threads learn of a replica's end a second late
            "consistent_hashing_lb_config": {"hash_balance_factor": BALANCE_PERCENT},
        },
        "health_checks": [HEALTH | api.check],
        "outlier_detection": OUTLIERS,
        "circuit_breakers": {"thresholds": [dict.fromkeys(BREAKERS, UNBOUNDED)]},
        **_connections(api),
        **({"transport_socket": _tls(tls, api.alpn)} if tls is not None else {}),
        "load_assignment": {
            "cluster_name": api.name,
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


STILL: Final[Json] = {
    # A draining replica answers 503 and keeps its connections; a stalled replica answers nothing.
    "timeout": "5s",
    "interval": "1s",
    "no_traffic_interval": "1s",
    "unhealthy_threshold": 3,
    "healthy_threshold": 1,
    "http_health_check": {"path": HEALTH_ROUTE.path, "expected_statuses": [{"start": 200, "end": 600}]},
}
SOON: Final = dict.fromkeys(("no_traffic_interval", "unhealthy_interval"), "0.2s")
"""The first look fails, for Envoy looks before it listens, on its TCP proxies too."""
HEALTH: Final[Json] = {
    "timeout": "2s",
    "interval": "1s",
    "no_traffic_interval": "1s",
    "unhealthy_threshold": 2,
    "healthy_threshold": 1,
}


def _connections(api: _Api) -> Json:
    options = {
        "@type": f"type.googleapis.com/{HTTP_OPTIONS}",
        "common_http_protocol_options": {"idle_timeout": f"{api.idle_s}s"},
        "explicit_http_config": api.protocol,
    }
    keepalive = {"keepalive_time": 30, "keepalive_interval": 10, "keepalive_probes": 3}
    return {
        "upstream_connection_options": {"tcp_keepalive": keepalive},
        "typed_extension_protocol_options": {HTTP_OPTIONS: options},
    }


def _endpoint(place: Place, key: str | None) -> Json:
    address = {"address": place.host, "port_value": place.port}
    named = {} if key is None else {"hostname": inner_name(place)}
    endpoint: Json = {"endpoint": {"address": {"socket_address": address}} | named}
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
