"""The listeners for clients: routes, retries, and the access log."""

from typing import Any, Final

from loramux_envoy.clusters import ANSWERS, BUFFER_BYTES, inner_name, proxy_address
from loramux_envoy.fleet import Fleet, Place
from loramux_envoy.model import HEADER, filters_of_json, filters_of_protobuf
from loramux_envoy.place import PLACE, filter_of_places, replica_header
from loramux_envoy.replies import LOCAL_REPLIES
from loramux_shared.routes import INFERENCE_SERVICE, ROUTES
from loramux_shared.rpc.options import IDLE_S, MAX_REQUEST_BYTES, MAX_STREAMS, PING_S, PING_TIMEOUT_S

Json = dict[str, Any]

TYPE: Final = "type.googleapis.com/envoy.extensions"
UPLOAD_WINDOW_BYTES: Final = 1024 * 1024
UPLOADS_WINDOW_BYTES: Final = 16 * 1024 * 1024
BODY_BYTES: Final = MAX_REQUEST_BYTES + 64 * 1024
"""Largest request, buffered until its answer begins: the largest that replicas take, in its frame."""
HTTP_IDLE_S: Final = 65
RETRIES: Final = 5
BACK_OFF: Final = {"base_interval": "0.05s", "max_interval": "1s"}
"""Five tries last about a second. Where all others have as much as they may, a replica that was killed is
chosen again until three connections have failed, which is known sooner."""
SELECTIONS: Final = 32
"""Draws of a replica that has not had the request yet: of two, all fail once in 2^32."""
GENERATE: Final = f"/{INFERENCE_SERVICE}/"
COMPLETIONS: Final = tuple(route.path for route in ROUTES if route.streams)
NOT_BEGUN: Final = "connect-failure,refused-stream"
BEGUN: Final = f"{NOT_BEGUN},reset"
"""Also where a replica may have begun, for its work is lost with it, and nobody has seen any of it."""
GONE: Final = "unavailable,cancelled"
"""Cancelled is what gRPC says by itself of a call that arrives at the very moment in which its server ends."""
REFUSED: Final = "retriable-status-codes"
STATUSES: Final = (408, 503)
"""Nothing was begun: 408 is what a replica that ends says on a connection that is asked in that moment."""
LOG: Final = {
    "time": "%START_TIME%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "client": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
    "method": "%REQ(:METHOD)%",
    "path": "%PATH(NQ)%",
    "model": f"%REQ({HEADER.upper()})%",
    "place": f"%REQ({PLACE.upper()})%",
    "replica": "%UPSTREAM_HOST%",
    "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
    "status": "%RESPONSE_CODE%",
    "why": "%RESPONSE_CODE_DETAILS%",
    "first_byte_ms": "%RESPONSE_DURATION%",
    "duration_ms": "%DURATION%",
    "bytes_in": "%BYTES_RECEIVED%",
    "bytes_out": "%BYTES_SENT%",
}
"""No prompt, no answer, no key."""


def grpc_listener(fleet: Fleet) -> Json:
    """Return the gRPC listener."""
    routes = [
        _route(GENERATE, "replicas_grpc", _retry(f"{BEGUN},{GONE}", fleet.first_token_s)),
        _route("/", "replicas_grpc", _retry(f"{NOT_BEGUN},{GONE}")),
    ]
    http2 = {
        "max_concurrent_streams": MAX_STREAMS,
        "initial_stream_window_size": UPLOAD_WINDOW_BYTES,
        "initial_connection_window_size": UPLOADS_WINDOW_BYTES,
        "connection_keepalive": {"interval": f"{PING_S}s", "timeout": f"{PING_TIMEOUT_S}s"},
    }
    protocol = {"codec_type": "HTTP2", "http2_protocol_options": http2}
    log = LOG | {"grpc_status": "%GRPC_STATUS%"}
    return _listener("grpc", fleet.grpc, protocol, IDLE_S, routes, filters_of_protobuf(), log)


def http_listener(fleet: Fleet) -> Json:
    """Return the listener of the HTTP APIs."""
    answers = ANSWERS if fleet.is_watched else "replicas_http"
    routes = [
        *(_route(path, answers, _retry(f"{BEGUN},{REFUSED}")) for path in COMPLETIONS),
        _route("/", "replicas_http", _retry(f"{NOT_BEGUN},{REFUSED}")),
    ]
    protocol = {"codec_type": "AUTO", "local_reply_config": LOCAL_REPLIES}
    filters = filters_of_json(fleet.first_token_s)
    log = LOG | ({"replica": "%UPSTREAM_HOST_NAME%"} if fleet.is_watched else {})
    return _listener("http", fleet.http, protocol, HTTP_IDLE_S, routes, filters, log)


def inner_listener(fleet: Fleet, number: int) -> Json:
    """Return the TCP proxy of a replica's HTTP endpoint, which only this Envoy reaches."""
    place = fleet.replicas[number].http
    proxy = {
        "@type": f"{TYPE}.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "replica_http",
        "cluster": inner_name(place),
        "idle_timeout": "0s",
    }
    return {
        "name": inner_name(place),
        "address": proxy_address(fleet, number),
        "per_connection_buffer_limit_bytes": BUFFER_BYTES,
        "filter_chains": [{"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": proxy}]}],
    }


def _listener(
    name: str, place: Place, protocol: Json, idle_s: int, routes: list[Json], filters: list[Json], log: Json
) -> Json:
    hosts = [
        {
            "name": name,
            "domains": ["*"],
            "response_headers_to_add": [replica_header(log["replica"])],
            "routes": routes,
        }
    ]
    manager = {
        "@type": f"{TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        **protocol,
        "use_remote_address": True,
        "preserve_external_request_id": True,
        "server_header_transformation": "PASS_THROUGH",
        "common_http_protocol_options": {"idle_timeout": f"{idle_s}s"},
        "request_headers_timeout": "10s",
        "request_timeout": "60s",
        "stream_idle_timeout": "0s",
        "access_log": [_access_log(log)],
        "http_filters": [*filters, filter_of_places(), ROUTER],
        "route_config": {"name": name, "virtual_hosts": hosts},
    }
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    return {
        "name": name,
        "address": {"socket_address": {"address": place.host, "port_value": place.port}},
        "enable_reuse_port": False,  # a second server on the same port must fail, not share it
        "per_connection_buffer_limit_bytes": BUFFER_BYTES,
        "filter_chains": [chain],
    }


ROUTER: Final = {
    "name": "envoy.filters.http.router",
    "typed_config": {"@type": f"{TYPE}.filters.http.router.v3.Router", "suppress_envoy_headers": True},
}


def _route(prefix: str, cluster: str, retry: Json) -> Json:
    return {
        "match": {"prefix": prefix},
        "request_body_buffer_limit": BODY_BYTES,
        "route": {
            "cluster": cluster,
            "timeout": "0s",
            "idle_timeout": "0s",
            "hash_policy": [{"header": {"header_name": PLACE}}],
            "retry_policy": retry,
        },
    }


def _retry(on: str, first_token_s: float = 0) -> Json:
    return {
        "retry_on": on,
        **({"retriable_status_codes": list(STATUSES)} if REFUSED in on else {}),
        "num_retries": RETRIES,
        "retry_back_off": BACK_OFF,
        **({"per_try_timeout": f"{first_token_s:.3f}s"} if first_token_s else {}),
        "retry_host_predicate": [
            {
                "name": "envoy.retry_host_predicates.previous_hosts",
                "typed_config": {"@type": f"{TYPE}.retry.host.previous_hosts.v3.PreviousHostsPredicate"},
            }
        ],
        "host_selection_retry_max_attempts": SELECTIONS,
    }


def _access_log(fields: Json) -> Json:
    return {
        "name": "envoy.access_loggers.stdout",
        "typed_config": {
            "@type": f"{TYPE}.access_loggers.stream.v3.StdoutAccessLog",
            "log_format": {"json_format": fields},
        },
    }
