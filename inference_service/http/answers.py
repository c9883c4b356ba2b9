"""What answers look like, apart from those of chat and plain completions; `openapi` makes schemas of it.

Sources: OpenAI's API reference for `Error` and `ModelList`; vLLM's entrypoints for tokens and trainers;
SGLang's for `Loads`. The rest is ours.
"""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from inference_service.http.openai.answers import PromptDetails


class ErrorDetail(TypedDict):
    """What went wrong: what was expected, what was found and what to do."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    """A request that failed."""

    error: ErrorDetail


class VllmError(Error):
    """The same, with the fields that clients of vLLM read beside it; a key that is refused has none of them."""

    object: NotRequired[Literal["error"]]
    message: NotRequired[str]
    type: NotRequired[str]
    param: NotRequired[str | None]
    code: NotRequired[int]


class Model(TypedDict):
    """The base, whose parent is null, or an adapter of it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    generation: int
    digest: str | None
    tier: Literal["store", "host", "device"]
    ranks: list[int]
    modules: list[str]
    kinds: list[str]
    replaced_rows: dict[str, int]
    invocation_tokens: list[int]
    num_labels: int | None
    licence: str | None
    base_licence: str | None
    tool_parser: str | None
    reasoning_parser: str | None
    warnings: list[str]
    last_failure: Failure | None
    type: Literal["model"]
    """This and what follows are Anthropic's."""
    display_name: str
    created_at: str


class ModelList(TypedDict):
    """The models that the caller's key may use."""

    object: Literal["list"]
    data: list[Model]
    has_more: Literal[False]
    """Anthropic's, as the ids of the first and the last."""
    first_id: str | None
    last_id: str | None


class Failure(TypedDict):
    """Why an adapter is served no more (MODEL_UNUSABLE), or why its last load failed."""

    reason: str
    message: str


class Adapter(TypedDict):
    """A name, and where the adapter that it stands for is."""

    id: str
    object: Literal["adapter"]
    digest: str
    resident_digest: str | None
    generation: int
    tier: Literal["store", "host", "device"]
    residency: Literal["absent", "loading", "held", "copying", "resident"]
    pinned: bool
    in_flight: int
    waiting: int
    bytes: int
    last_used: int | None
    last_failure: Failure | None
    only_here: bool


class Replica(TypedDict):
    """How the replica stands to its deployment (fixed, current, stale, blind), and what its bank holds."""

    deployment: str
    generation: int
    newest_generation: int
    state: str
    reason: str
    paused: bool
    bank_bytes: int
    bank_bytes_used: int
    registered: int
    resident: int
    arriving: int
    pinned: int


class AdapterList(TypedDict):
    """A page of adapters; the token asks for the next one and is empty at the end."""

    object: Literal["list"]
    data: list[Adapter]
    next_page_token: str
    replica: Replica


class RolledBack(TypedDict):
    """The generation that is served now: a new one, with what the older one had."""

    generation: int


class PromptUsage(TypedDict):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Embedding(TypedDict):
    """The vector of an input: numbers, or float32 in little endian as base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(TypedDict):
    """The vectors of inputs."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: PromptUsage


class Score(TypedDict):
    """How a pair of texts scores."""

    object: Literal["score"]
    index: int
    score: float


class Scores(TypedDict):
    """vLLM's answer to pairs of texts."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: PromptUsage


class Document(TypedDict):
    """The text of a document."""

    text: str


class Ranked(TypedDict):
    """A document among others."""

    index: int
    """Among those of the request."""
    relevance_score: float
    document: NotRequired[Document]


class Ranking(TypedDict):
    """Documents, the best first."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    results: list[Ranked]
    usage: PromptUsage


class Class(TypedDict):
    """What a text is."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classes(TypedDict):
    """vLLM's answer about texts."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Class]
    usage: PromptUsage


class Tokens(TypedDict):
    """The tokens of a text, and their texts where these were asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Prompt(TypedDict):
    """The text of tokens."""

    prompt: str


class PauseStatus(TypedDict):
    """What was done."""

    status: Literal["paused", "resumed"]


class IsPaused(TypedDict):
    """True while requests stand still."""

    is_paused: bool


class WorldSize(TypedDict):
    """How many devices share the model."""

    world_size: int


class ModelConfig(TypedDict):
    """The model as vLLM describes one."""

    model: str
    dtype: str | None
    max_model_len: int
    logprobs_mode: str


class ParallelConfig(TypedDict):
    """How the model is spread: not at all."""

    world_size: int
    tensor_parallel_size: int
    data_parallel_size: int


class LoraConfig(TypedDict):
    """Adapters of one step, and the largest rank."""

    max_loras: int
    max_lora_rank: int | None


class VllmConfig(TypedDict):
    """What trainers read of vLLM's configuration."""

    model_config: ModelConfig
    parallel_config: ParallelConfig
    lora_config: LoraConfig


class ServerInfo(TypedDict):
    """The configuration, under vLLM's name for it."""

    vllm_config: VllmConfig


class Version(TypedDict):
    """Which loramux this is."""

    version: str


class Health(TypedDict):
    """That requests are taken; ``slow`` where torch's operations stand in for compiled ones."""

    status: Literal["ok", "slow"]
    backend: str
    lack: NotRequired[str]
    """Why: ``no_compiler``, ``not_compiled``, ``wrong_result`` or ``unsupported``."""


class Blocks(TypedDict):
    """Cache blocks."""

    used: int
    total: int


class PrefixTokens(TypedDict):
    """Tokens of prompts, since the start: found in the cache, and looked for there."""

    hit: int
    queried: int


class AtWork(TypedDict):
    """Sequences of a model."""

    running: int
    waiting: int


class State(TypedDict):
    """The load of the whole server, and which of the caller's models have sequences."""

    running: int
    waiting: int
    kv_blocks: Blocks
    prefix_tokens: PrefixTokens
    generated_tokens: int
    models: dict[str, AtWork]


class Load(TypedDict):
    """Requests in work."""

    server_load: int


class RankLoad(TypedDict):
    """How full the replica is."""

    dp_rank: int
    num_running_reqs: int
    num_waiting_reqs: int
    num_total_reqs: int
    num_used_tokens: int
    max_total_num_tokens: int
    token_usage: float
    cache_hit_rate: float
    utilization: float
    max_running_requests: int


class Loads(TypedDict):
    """The load of each rank, of which there is one."""

    timestamp: str
    version: str
    dp_rank_count: int
    loads: list[RankLoad]
