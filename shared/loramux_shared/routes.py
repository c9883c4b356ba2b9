"""The routes of the HTTP API and the gRPC services, as data that servers and proxies read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from loramux_shared.access.keys import Scope


@dataclass(frozen=True)
class Route:
    """A route of the HTTP API."""

    method: str
    path: str
    """Path as in Starlette: ``{name}`` is a part of it."""
    scope: Scope | None = Scope.INFER
    """The scope of the keys that open it; None: no key is needed."""
    streams: bool = False
    """True where the answer is generated, token by token where the body says ``stream``."""

    @property
    def repeatable(self) -> bool:
        """True where a second replica may be asked after a first one failed: inference changes no state."""
        return self.method == "GET" or self.scope is Scope.INFER


CHAT_COMPLETIONS: Final = Route("POST", "/v1/chat/completions", streams=True)
COMPLETIONS: Final = Route("POST", "/v1/completions", streams=True)
MESSAGES: Final = Route("POST", "/v1/messages", streams=True)
"""Its path and all paths below it speak Anthropic's API, all others OpenAI's."""
COUNT_TOKENS: Final = Route("POST", "/v1/messages/count_tokens")
RESPONSES: Final = Route("POST", "/v1/responses", streams=True)
INPUT_TOKENS: Final = Route("POST", "/v1/responses/input_tokens")
EMBEDDINGS: Final = Route("POST", "/v1/embeddings")
FILES: Final = Route("GET", "/v1/files")
CREATE_FILE: Final = Route("POST", "/v1/files")
FILE: Final = Route("GET", "/v1/files/{id}")
DELETE_FILE: Final = Route("DELETE", "/v1/files/{id}")
FILE_CONTENT: Final = Route("GET", "/v1/files/{id}/content")
BATCHES: Final = Route("GET", "/v1/batches")
CREATE_BATCH: Final = Route("POST", "/v1/batches")
BATCH: Final = Route("GET", "/v1/batches/{id}")
CANCEL_BATCH: Final = Route("POST", "/v1/batches/{id}/cancel")
SCORE: Final = Route("POST", "/score")
SCORE_V1: Final = Route("POST", "/v1/score")
RERANK: Final = Route("POST", "/rerank")
RERANK_V1: Final = Route("POST", "/v1/rerank")
RERANK_V2: Final = Route("POST", "/v2/rerank")
CLASSIFY: Final = Route("POST", "/classify")
CLASSIFY_V1: Final = Route("POST", "/v1/classify")
PREDICT: Final = Route("POST", "/predict")
EMBED: Final = Route("POST", "/embed")
EMBED_SPARSE: Final = Route("POST", "/embed_sparse")
POOLING: Final = Route("POST", "/pooling")
MODELS: Final = Route("GET", "/v1/models")
MODEL: Final = Route("GET", "/v1/models/{model:path}")
ADAPTERS: Final = Route("GET", "/v1/adapters", Scope.ADMIN)
PIN: Final = Route("POST", "/v1/adapters/{name:path}/pin", Scope.ADMIN)
UNPIN: Final = Route("POST", "/v1/adapters/{name:path}/unpin", Scope.ADMIN)
ROLLBACK: Final = Route("POST", "/v1/rollback", Scope.ADMIN)
LOAD_ADAPTER: Final = Route("POST", "/v1/load_lora_adapter", Scope.ADMIN)
UNLOAD_ADAPTER: Final = Route("POST", "/v1/unload_lora_adapter", Scope.ADMIN)
PAUSE: Final = Route("POST", "/pause", Scope.ADMIN)
RESUME: Final = Route("POST", "/resume", Scope.ADMIN)
IS_PAUSED: Final = Route("GET", "/is_paused", Scope.ADMIN)
WORLD_SIZE: Final = Route("GET", "/get_world_size")
SERVER_INFO: Final = Route("GET", "/server_info")
TOKENIZE: Final = Route("POST", "/tokenize")
DETOKENIZE: Final = Route("POST", "/detokenize")
INFO: Final = Route("GET", "/info")
VERSION: Final = Route("GET", "/version")
OPENAPI: Final = Route("GET", "/openapi.json")
HEALTH: Final = Route("GET", "/health", None)
PING: Final = Route("GET", "/ping", None)
POST_PING: Final = Route("POST", "/ping", None)
STATE: Final = Route("GET", "/state")
LOAD: Final = Route("GET", "/load", Scope.METRICS)
LOADS: Final = Route("GET", "/loads", Scope.METRICS)
LOADS_V1: Final = Route("GET", "/v1/loads", Scope.METRICS)
METRICS: Final = Route("GET", "/metrics", Scope.METRICS)

MODEL_HEADER: Final = "x-loramux-model"
"""The header, or metadata, that names the model to proxies; in an answer over HTTP the one that answered."""

ROUTES: Final = tuple(value for value in globals().copy().values() if isinstance(value, Route))
"""All of them but the files of the page, in the order in which they are written down."""

INFERENCE_SERVICE: Final = "loramux.inference.v1.InferenceService"
"""Its calls change no state: all of them may be repeated."""
ADAPTER_SERVICE: Final = "loramux.inference.v1.AdapterService"
BUILDER_SERVICE: Final = "loramux.builder.v1.BuilderService"
SCOPES: Final[Mapping[str, Scope | None]] = {
    INFERENCE_SERVICE: Scope.INFER,
    ADAPTER_SERVICE: Scope.ADMIN,
    BUILDER_SERVICE: Scope.BUILD,
    "grpc.reflection.v1alpha.ServerReflection": None,
}
"""The scope of the keys that open a gRPC service; None: any key. A service that is not here needs admin."""
OF_A_MODEL: Final = ("Generate", "Embed", "Classify")
"""The methods of INFERENCE_SERVICE that one model answers; its name is field 1 of their requests."""
