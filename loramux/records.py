"""The records of the client: events of an answer, models, deployments. Plain and frozen, no protobuf."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, NotRequired, TypeAlias, TypedDict

from loramux_shared.bundle.kinds import SILENT
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.deployment import Dtype, Repository
from loramux_shared.faults import Fault, Finding


class Message(TypedDict):
    """One turn of a chat, in the shape of the OpenAI API."""

    role: str
    content: str
    """Empty or, in a plain dictionary, None or absent beside tool_calls."""
    name: NotRequired[str]
    tool_calls: NotRequired[Sequence[Mapping[str, Any]]]
    """``{"id": ..., "function": {"name": ..., "arguments": ...}}``; the arguments as JSON text or as a dict."""
    tool_call_id: NotRequired[str]
    reasoning: NotRequired[str]
    """Reasoning of an assistant's message, for the template.

    ``reasoning_content`` in a plain dictionary too.
    """


Prompt: TypeAlias = str | Sequence[int] | Sequence[Message] | Sequence[Mapping[str, Any]]
"""Text, token ids that are taken as they are, or messages for the chat template."""


class GenerateOptions(TypedDict, total=False):
    """Options of an answer; one that is absent or None is left to the server."""

    max_tokens: int | None
    """New tokens at most; the deployment's default, else what fits."""
    temperature: float | None
    """0, the default, is greedy."""
    top_p: float | None
    top_k: int | None
    seed: int | None
    """Makes a sampled answer repeatable."""
    stop: str | Sequence[str] | None
    """The answer ends before the first of these texts."""
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool | None
    """The text ends with what ended it."""
    ignore_eos: bool | None
    """Go on past the end-of-sequence token."""
    logprobs: int | None
    """Log probability of each token, and of this many of the most likely ones beside it."""
    logprobs_mode: str | None
    """raw, the model's own, or processed, those that tokens are drawn by; the server's setting, else raw."""
    prompt_logprobs: int | None
    """The same for the tokens of the prompt."""
    n: int | None
    """Answers; 1 is the default."""
    min_p: float | None
    """Leave out tokens less likely than this part of the most likely one."""
    min_tokens: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    """Added to the logits of tokens."""
    bad_words: str | Sequence[str] | None
    """Texts that the answer never has."""
    allowed_token_ids: Sequence[int] | None
    """No other tokens are drawn."""
    skip_special_tokens: bool | None
    """Leave special tokens out of the text; they are by default."""
    json_object: bool | None
    """The answer is a JSON object. At most one of this and the next three."""
    json_schema: Mapping[str, Any] | str | None
    """The answer is JSON of this schema."""
    regex: str | None
    """The whole answer matches."""
    lark: str | None
    """The answer is of this grammar's rule ``start``."""
    tools: Sequence[Mapping[str, Any]] | None
    """Functions for the chat template to tell the model, in the shape of the OpenAI API."""
    add_generation_prompt: bool | None
    """End the prompt of messages with the beginning of the assistant's turn; it does by default."""
    chat_template_kwargs: Mapping[str, Any] | None
    """Variables of the chat template beside the usual ones, such as ``{"enable_thinking": False}``."""
    continue_final_message: bool | None
    """Go on with the last message; add_generation_prompt must be False."""
    add_special_tokens: bool | None
    """Tokenize with the special tokens that the tokenizer adds itself; by default text, but not messages."""
    truncate_prompt_tokens: int | None
    """Leave out the beginning of a longer prompt; -1: of one that leaves no room for the answer."""
    cache_salt: str | None
    """Only requests with the same one share cached prompts."""
    priority: int | None
    """Requests of a higher priority are scheduled first; 0 is the default."""
    min_generation: int | None
    """Answer with this generation of the deployment or a later one."""
    adapters: Sequence[tuple[str, float] | str] | None
    """Adapters with scales that act together, 1 where none is said; the model is "" or the base's name then."""
    sticky_key: str | None
    """Key of an alias: requests with the same key get the same one of its models."""


# The members of the enums below stand in the order of the numbers in the proto files, beginning with 0.


class FinishReason(StrEnum):
    """Why an answer ended."""

    UNSPECIFIED = "unspecified"
    STOP = "stop"
    LENGTH = "length"


class DeploymentState(StrEnum):
    """The state of a deployment's newest build."""

    UNSPECIFIED = "unspecified"
    BUILDING = "building"
    ACTIVE = "active"
    FAILED = "failed"


class Stage(StrEnum):
    """A stage in the build of an adapter."""

    UNSPECIFIED = "unspecified"
    WAITING = "waiting"
    FETCHING = "fetching"
    VALIDATING = "validating"
    CONVERTING = "converting"
    PUBLISHING = "publishing"
    DONE = "done"
    REFUSED = "refused"
    PROVING = "proving"


@dataclass(frozen=True)
class Started:
    """The request was accepted; says what answers it."""

    request_id: str
    model: str
    """Name of the model; of an alias, that of the model that was picked."""
    adapter_digest: str
    """sha256 of the bundle's manifest, in hex; empty for the base."""
    generation: int
    """Generation by which the name was looked up."""
    prompt_tokens: int


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities at one token."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most likely tokens, as pairs of token id and log probability."""
    token: bytes = b""
    """Bytes that the token stands for; possibly a part of a character."""
    top_tokens: tuple[bytes, ...] = ()
    """The same for each of top."""
    rank: int = 0
    """1 + how many tokens are more likely; 0 from a server that does not tell it."""


@dataclass(frozen=True)
class PromptToken:
    """A token of the prompt."""

    token_id: int
    logprobs: TokenLogprobs | None
    """None for the first token, which has nothing before it."""


@dataclass(frozen=True)
class PromptLogprobs:
    """Tokens of the prompt, in their order; those of a long prompt come in several events."""

    tokens: tuple[PromptToken, ...]


@dataclass(frozen=True)
class Delta:
    """New text, and the tokens decoded so far; text can lag behind tokens."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    index: int = 0
    """Index of the answer among the n."""


@dataclass(frozen=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    cached_tokens: int
    """Tokens of the prompt whose keys and values were cached."""
    completion_tokens: int


@dataclass(frozen=True)
class Finished:
    """An answer is complete."""

    reason: FinishReason
    usage: Usage
    stop_text: str = ""
    """The stop text that ended the answer, if one did."""
    index: int = 0
    """Index of the answer among the n."""
    stop_token_id: int | None = None
    """The one of the request's stop_token_ids that ended the answer, if one did."""


Event: TypeAlias = Started | PromptLogprobs | Delta | Finished


@dataclass(frozen=True)
class Choice:
    """One of n answers."""

    text: str
    token_ids: tuple[int, ...]
    reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprobs, ...] = ()
    stop_text: str = ""
    stop_token_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class Completion(Choice):
    """A whole answer: the first one, and all of them."""

    started: Started
    choices: tuple[Choice, ...]
    """Choices in the order of their index."""
    prompt: tuple[PromptToken, ...] = ()
    """The tokens of the prompt, where prompt_logprobs were asked for."""


@dataclass(frozen=True)
class ModelInfo:
    """A model that is served: the base or an adapter."""

    name: str
    parent: str
    """The base's name for an adapter; empty for the base."""
    digest: str
    """sha256 of the bundle's manifest, in hex; empty for the base."""
    ranks: tuple[int, ...]
    modules: tuple[str, ...]
    warnings: tuple[str, ...]
    load_time: datetime | None
    generation: int
    max_seq_len: int
    """Tokens of prompt and answer together."""
    kinds: tuple[str, ...] = ()
    """Kinds of an adapter: see docs/reference/adapters.md; empty for the base."""
    replaced_rows: Mapping[str, int] = field(default_factory=dict)
    """Numbers of rows of embeddings and head that an adapter replaces, by the module's name."""
    invocation_tokens: tuple[int, ...] = ()
    """Tokens from which on an adapter acts; none where it acts on everything."""
    licence: str = ""
    """Licence that its repository names; empty where it names none."""
    base_licence: str = ""
    """Licence of an adapter's base; likewise."""
    tool_parser: str = ""
    """The form in which it writes calls of tools, auto where its template shows none; empty while not known."""
    reasoning_parser: str = ""
    """The same of its reasoning."""
    num_labels: int = 0
    """Labels that a classifier scores; `Client.classify` returns their names."""

    @property
    def is_base(self) -> bool:
        """Return True if this is the base."""
        return not self.parent

    @property
    def generates(self) -> bool:
        """Return True if it answers with text: a model that was trained for scores or vectors does not."""
        return SILENT.isdisjoint(self.kinds)


@dataclass(frozen=True)
class AdapterInfo:
    """The build of one adapter."""

    name: str
    stage: Stage
    bytes_done: int
    """Bytes done of the present stage."""
    bytes_total: int | None
    """Bytes of the present stage; None while it is not known."""
    digest: str
    """sha256 of the bundle's manifest, in hex, once it is known."""
    ranks: tuple[int, ...]
    modules: tuple[str, ...]
    tensors_used: int
    bundle_bytes: int
    warnings: tuple[Finding, ...]
    reused: bool
    """True if the store held the bundle already, and its bytes were read back and found right."""
    repaired: bool = False
    """True if the store held the bundle with other bytes or without some, and they were put again."""
    kept: bool = False
    """True if it is unchanged since the served generation, so that nothing was fetched or made."""
    added: bool = False
    """True if it is not in the deployment that is built: it was added or pushed before, and stays."""
    kinds: tuple[str, ...] = ()
    """Kinds of the adapter, as in `ModelInfo`."""


@dataclass(frozen=True)
class DeploymentInfo:
    """A deployment as the builder sees it."""

    name: str
    state: DeploymentState
    generation: int | None
    """The generation that is served; None before the first."""
    create_time: datetime | None
    update_time: datetime | None
    adapters: tuple[AdapterInfo, ...]
    failure: Fault | None
    """Why the newest build failed: ready to be raised."""
    unchanged: bool
    """True if the newest build found everything published already."""


@dataclass(frozen=True)
class RowReport:
    """A module of a layer that an adapter changes."""

    layer: int
    module_id: int
    module: str
    """TensorRT-LLM's name, for example ``attn_q``."""
    rank: int
    in_features: int
    out_features: int
    scale: float
    """alpha/r or alpha/sqrt(r)."""
    norm_a: float
    norm_b: float
    """Norm of B with the scale."""
    norm_ba: float
    """Norm of the product: how much the adapter changes this module."""
    truncated_from: int | None
    """The adapter's own rank, where it was truncated."""
    truncation_error: float
    """Relative error of the product."""
    expert: int | None
    """Expert of a mixture's layer that has the module."""
    vectors: int = 0
    """Vectors behind B: its output is also multiplied, or something is added to it."""


@dataclass(frozen=True)
class AdapterReport:
    """The result of an adapter's check."""

    accepted: bool
    """True if a build would accept it."""
    adapter: Repository
    """Repository with the resolved revision, where the files were fetched."""
    base: Repository
    files: Mapping[str, FileDigest]
    """Files that a bundle is made from, by name; empty where the adapter was refused for its files."""
    findings: tuple[Finding, ...]
    """Errors first."""
    rows: tuple[RowReport, ...]
    """Rows by (layer, module id); empty where the adapter was refused."""
    dtype: Dtype
    """Storage type of the bundle."""
    bundle_bytes: int
    base_model_name: str
    """Base that the adapter names as its own."""
    licence: str = ""
    """Licence that its repository names; empty where it names none."""
    base_licence: str = ""
    kinds: tuple[str, ...] = ()
    """Kinds of the adapter, as in `ModelInfo`; empty where it was refused, as all fields that follow."""
    replaced_rows: Mapping[str, int] = field(default_factory=dict)
    invocation_tokens: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    """Labels of a classifier, in their order; LABEL_0 and so on where they have no names."""
    problem_type: str = ""
    """Meaning of its scores, as in transformers; empty where it names none."""
