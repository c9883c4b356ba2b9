"""The settings of both services: ``LORAMUX_*`` variables, read once, frozen.

S3's endpoint and credentials are no settings of ours: the standard ``AWS_*`` variables hold them.
"""

import os
import re
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from loramux_shared.faults import SettingsInvalid
from loramux_shared.process import LogFormat
from loramux_shared.runtime import Parsers, ReasoningParser, Rounding, ToolParserName
from loramux_shared.signatures import read_signer
from loramux_shared.sources.secrets import ENVIRONMENT_PREFIX as SECRET_PREFIX
from loramux_shared.wording import expected_of, nearest, refuse_odd

PREFIX = "LORAMUX_"
CLIENT_VARIABLES = ("API_KEY", "TLS_CA", "CLIENT_CERT", "CLIENT_KEY")
"""Variables that `loramux.Client` and commands read; a service may share their environment."""


def _address(value: str) -> str:
    host_port = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):([0-9]{1,5})", value)
    if not (host_port and int(host_port[2]) < 2**16) and not re.fullmatch(r"unix:/\S+", value):
        raise ValueError("HOST:PORT, for example 127.0.0.1:50051, or unix:/PATH")
    return value


def _destination(value: str) -> str:
    try:
        return _address(value.removeprefix("grpcs://")) and value
    except ValueError as error:
        raise ValueError(f"{error}; with grpcs:// in front for TLS") from error


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError("a path; this user has no home, so it cannot begin with ~") from error


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError(f"absolute folders, separated by {os.pathsep!r}")
    return path


def _split(value: Any) -> Any:
    return tuple(filter(None, value.split(os.pathsep))) if isinstance(value, str) else value


def _split_hosts(value: Any) -> Any:
    return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value


def _signer(value: str) -> str:
    return read_signer(value, Path())


def _host(value: str) -> str:
    if not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.\-]+)(:[0-9]{1,5})?", value):
        raise ValueError("HOST or HOST:PORT, for example models.example.com, separated by commas")
    return value.lower()


def _of_device(value: Any) -> Any:
    return None if value == "auto" else value


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError("a power of two")
    return value


Address = Annotated[str, AfterValidator(_address)]
"""An address on which a server listens."""

Destination = Annotated[str, AfterValidator(_destination)]
"""The address of another service."""

HomePath = Annotated[Path, AfterValidator(_expanded)]
"""A path that may begin with ``~``."""

Folders = Annotated[
    tuple[Annotated[HomePath, AfterValidator(_absolute)], ...], NoDecode, BeforeValidator(_split)
]
"""Absolute folders; in a variable separated by ``:`` (``;`` on Windows)."""

Hosts = Annotated[tuple[Annotated[str, AfterValidator(_host)], ...], NoDecode, BeforeValidator(_split_hosts)]
"""Hosts; in a variable separated by commas."""

Signers = Annotated[
    tuple[Annotated[str, AfterValidator(_signer)], ...], NoDecode, BeforeValidator(_split_hosts)
]
"""Files of public keys or certificates (PEM), or sigstore:ISSUER#IDENTITY, separated by commas."""

Count = Annotated[int, Field(ge=1, lt=2**31)]
Workers = Annotated[int, Field(ge=1, le=1024)]
"""Threads or processes."""
Gigabytes = Annotated[float, Field(gt=0, lt=1e6, allow_inf_nan=False)]
GigabytesOrZero = Annotated[float, Field(ge=0, lt=1e6, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, lt=1e9, allow_inf_nan=False)]
SecondsOrZero = Annotated[float, Field(ge=0, lt=1e9, allow_inf_nan=False)]

AUTO: Final = Field(json_schema_extra={"default": "auto"})
OfDevice = Annotated[Count | None, BeforeValidator(_of_device), AUTO]
"""A number, or ``auto`` (None): what the kind of device has in `STEP_SIZES`."""

CountOfDevice = Annotated[Annotated[int, Field(ge=0, lt=2**31)] | None, BeforeValidator(_of_device), AUTO]
"""The same, and 0."""
ProcessesOfDevice = Annotated[Annotated[int, Field(ge=0, le=256)] | None, BeforeValidator(_of_device), AUTO]


@dataclass(frozen=True)
class StepSizes:
    """The sizes of steps, how often their tokens are sent, and the processes that send them."""

    tokens: int
    seqs: int
    interval_ms: int
    speculative: int
    api_processes: int


STEP_SIZES: Final = {"cpu": StepSizes(1024, 64, 40, 8, 0), "cuda": StepSizes(8192, 256, 10, 0, 1)}
"""Step sizes by kind of device.

A GPU computes hundreds of rows in the time that it takes to read its weights, and leaves the cores of its host
to the APIs, so that tokens may be sent sooner; drafts would cost it the step ahead.
"""


class Settings(BaseSettings):
    """The settings that both services have."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _plain_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        plain = value.strip() if isinstance(value, str) else value
        refuse_odd(plain, cls.model_fields[str(info.field_name)].annotation)
        return value

    store: str = Field(default="file://~/.local/share/loramux/store", min_length=1)
    """The object store: s3://BUCKET/PREFIX, file:///DIR or file://~/DIR."""
    local_roots: Folders = ()
    """The folders from which LOCAL repositories may be read, with everything below; none by default."""
    allowed_hosts: Hosts = ()
    """Hosts that REMOTE_URL and OCI may reach though their addresses are not public: HOST or HOST:PORT, with
    commas between them."""
    secrets_dir: HomePath = Path("/secrets")
    """Holds one file per secret; a repository's runtime_secret_name is the file's name."""
    keys_file: HomePath | None = None
    """Holds the API keys, as `loramux keys new` writes them; read again when it changes."""
    api_keys: SecretStr = SecretStr("")
    """More such lines. Without any key, everybody who reaches the port may enter."""
    http_hosts: Hosts = ()
    """Names of this server, as of a proxy in front: HOST or HOST:PORT, with commas between them.
    docs/guides/access.md says when they are needed."""
    insecure: bool = False
    """Listen beyond this machine although no key or certificate is required."""
    tls_cert: HomePath | None = None
    """The certificate chain (PEM) of all APIs, read again when it changes; without it nothing is encrypted."""
    tls_key: HomePath | None = None
    """The private key (PEM) of tls_cert."""
    tls_client_ca: HomePath | None = None
    """Clients must show a certificate that one of these authorities (PEM) signed."""
    require_signature: Signers = ()
    """Signers of which a generation must have one, before a byte of it is used.

    Files of public keys or certificates (PEM), or sigstore:ISSUER#IDENTITY, separated by commas;
    extensions/signing/README.md.
    """
    drain_delay_s: SecondsOrZero = 0
    """Seconds after SIGTERM in which health says no and requests are still taken."""
    drain_timeout_s: SecondsOrZero = 30
    """Seconds that running work may take to end after SIGTERM and drain_delay_s before it is cut off."""
    stall_timeout_s: Seconds = 30
    """Seconds that a client may pause in reading an answer, or in sending a body or an upload; then it is cut
    off."""
    log_format: LogFormat = "auto"
    """The log on stderr; auto: text on a terminal, else JSON lines."""


class BuilderSettings(Settings):
    """The builder service."""

    grpc: Address = "127.0.0.1:50051"
    """Address of the gRPC service."""
    work_dir: HomePath | None = None
    """Holds what is fetched while it is built; a temporary folder when not given."""
    max_concurrent_builds: Count = 2
    """Builds that run at once; others wait."""
    parallel_adapters: Count = 4
    """Adapters of one build that are worked on at once."""
    build_timeout_s: Seconds = 6 * 3600
    """Seconds that one build may run; then it fails. Keep it below the grace period of `loramux gc`."""
    max_build_gb: Gigabytes | None = None
    """GB (10^9 bytes) that one build may write into its work folder; what the disk has when not given."""
    signing_key: HomePath | None = None
    """The private key (PEM, an elliptic curve) that signs every generation that is published."""
    signing_certificates: HomePath | None = None
    """The certificates (PEM) of signing_key, its own first; they need require_signature."""
    metrics: Address | None = None
    """Address of `/metrics`; closed when not given. It asks for no key: loopback, unless insecure is set."""


class InferenceSettings(Settings):
    """The inference service."""

    deployment: str = Field(min_length=1)
    """The name of the deployment to serve: the model_name of its file."""
    grpc: Address = "127.0.0.1:50052"
    """Address of the gRPC service."""
    http: Address | None = None
    """Address of the HTTP APIs; closed when not given."""
    api_processes: ProcessesOfDevice = None
    """Processes that answer both APIs, beside the engine's process; 0: that one does, as always under Ray.

    auto: 0 on a CPU, 1 on a GPU.
    """
    batch_store: str | None = Field(default=None, min_length=1)
    """The store of files and batches of OpenAI's API, as `store` is written; without it there are none."""
    backend: Literal["auto", "native", "torch", "triton"] = "auto"
    """The kernels; auto: triton on CUDA, else native (compiled) where that can be, else torch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto: CUDA when there is a device, and the backend is not native."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The type of weights and activations; auto: the checkpoint's where the device computes well in it, which a
    CPU with compiled operations does in bfloat16."""
    quantization: Rounding | None = None
    """Rounding of the base's linears at load; fp8 is for GPUs.

    When not given, what the deployment's runtime says, else none.
    """
    tensor_parallel: Workers | None = None
    """Processes (ranks) that compute the base together, on a GPU each; the first one is the engine's.

    When not given, build.tensor_parallel_count of the deployment, else 1.
    """
    tool_parser: ToolParserName | None = None
    """The form in which the models write calls of tools, none: calls stay text. When not given, what the
    deployment's runtime says, else what the chat template of each shows."""
    reasoning_parser: ReasoningParser | None = None
    """The marks between which the models reason; the same."""
    native: bool = True
    """Use compiled operations on a CPU; a wheel has them, or the first start compiles them."""
    threads: Workers | None = None
    """Threads that compute on the CPU, of each rank; when not given, one for each core that it may use."""
    spin: Literal["auto", "always", "never"] = "auto"
    """Busy waiting of the threads of a step on a CPU.

    Faster on cores that nothing else wants, slower on others. auto: busy until they wait for cores.
    """
    deterministic: bool = False
    """Answer the same, bit for bit, in any batch and after prefix hits; on a CPU with compiled operations."""
    max_batch_tokens: OfDevice = None
    """Most tokens per step, prompts and answers together; auto: 1024 on a CPU, 8192 on a GPU."""
    max_batch_seqs: OfDevice = None
    """Sequences per step, at most its tokens; auto: 64 on a CPU, 256 on a GPU."""
    max_batch_adapters: Count = 64
    """Distinct adapters per step."""
    adapter_memory_gb: Gigabytes | None = None
    """Memory of resident adapters in GB (10^9 bytes); when not given, room for those of the start and some
    more, up to a quarter of what weights leave free (on a GPU 30 %)."""
    preload: Annotated[int, Field(ge=0, lt=2**31)] = 16
    """Adapters that are loaded before the replica says that it is ready; the others follow while it serves."""
    kv_memory_gb: Gigabytes | None = None
    """Memory of the KV cache in GB (10^9 bytes); chosen from what is free when not given."""
    kv_cache_dtype: Literal["auto", "fp8", "int8"] = "auto"
    """The type of the KV cache; auto: the model's. On a GPU, 8 bits hold nearly twice the tokens."""
    block_size: Annotated[Count, AfterValidator(_power_of_two)] = 16
    """Tokens per block of the KV cache; a power of two."""
    speculative_tokens: CountOfDevice = None
    """Tokens of a request that a step drafts at most, from what it said before; answers stay the same. 0: none;
    auto: what the deployment's runtime says, else 8 on a CPU, 0 on a GPU."""
    max_queue: Count = 1024
    """Requests that wait; one more is answered QUEUE_FULL."""
    step_timeout_s: Seconds = 300
    """Seconds that one step may take, kernels that it compiles included; then the replica ends with exit 5."""
    prefix_cache: bool = True
    """Keep the blocks of earlier prompts, for prompts that begin alike."""
    stream_interval_ms: CountOfDevice = None
    """Interval at which tokens of running answers are sent together, first and last ones at once; 0: each;
    auto: 40 on a CPU, 10 on a GPU."""
    prefill_first: bool = False
    """Compute prompts before answers under way go on: more tokens a second, for batch jobs."""
    cache_dir: HomePath = Path("~/.cache/loramux")
    """Holds base checkpoints and bundles that were fetched, and what was compiled. Replicas may share it."""
    adapter_disk_gb: GigabytesOrZero = 20
    """GB (10^9 bytes) of bundles in cache_dir; the least recently used leave. A store in a folder of the same
    file system is never copied."""
    adapter_host_gb: GigabytesOrZero = 8
    """GB (10^9 bytes) of a GPU machine's memory for adapters that left the device: locked as adapters come, at
    most half of what is free at the start."""
    adapter_threads: Workers = 1
    """Threads that pack and prove adapters beside the steps."""
    follow_interval_s: SecondsOrZero = 5
    """Seconds between two looks at the deployment's current generation; 0: the one of the start is served."""
    on_base_change: Literal["stay", "exit"] = "stay"
    """When a generation needs a restart (another base, other limits): serve on, or drain and end with 0."""
    builder: Destination | None = None
    """HOST:PORT of a builder (or grpcs://HOST:PORT) that announces new generations."""
    logprobs_mode: Literal["raw", "processed"] = "raw"
    """Log probabilities of answers where a request says none: raw are the model's own, processed those that a
    token is drawn by (vLLM's processed_logprobs)."""
    metrics_models: Count = 1000
    """Models that have series of their own in `/metrics`; what the rest count is that of the model (others)."""
    log_prompts: bool = False
    """Write prompts and answers to the log."""

    @field_validator("max_batch_seqs")
    @classmethod
    def _a_token_each(cls, seqs: int | None, info: ValidationInfo) -> int | None:
        tokens = info.data.get("max_batch_tokens")
        if seqs and tokens and seqs > tokens:
            raise ValueError(f"at most {variable('max_batch_tokens')}={tokens}: each answer takes one a step")
        return seqs

    @property
    def rounding(self) -> Rounding:
        """Return the rounding of weights."""
        return self.quantization or Rounding.NONE

    def parsers(self, tool: str, reasoning: ReasoningParser) -> Parsers:
        """Return how answers of chats are read, where a deployment says this."""
        return Parsers(self.tool_parser or tool, self.reasoning_parser or reasoning)

    def sizes(self, device: str, speculative: int | None = None) -> StepSizes:
        """Return the sizes of steps on a device, cpu or cuda; speculative is what the deployment says."""
        usual = STEP_SIZES[device]
        tokens = _first(self.max_batch_tokens, max(usual.tokens, self.max_batch_seqs or 0))
        return StepSizes(
            tokens=tokens,
            seqs=_first(self.max_batch_seqs, min(usual.seqs, tokens)),
            interval_ms=_first(self.stream_interval_ms, usual.interval_ms),
            speculative=_first(self.speculative_tokens, _first(speculative, usual.speculative)),
            api_processes=_first(self.api_processes, usual.api_processes),
        )


def _first(explicit: int | None, usual: int) -> int:
    return usual if explicit is None else explicit


AnySettings = TypeVar("AnySettings", bound=Settings)


def load_settings(cls: type[AnySettings], **overrides: object) -> AnySettings:
    """Read settings from the environment; overrides (from flags) that are not None come first.

    Raises:
        SettingsInvalid: a variable is unknown, or a value is missing or not allowed; all of them at once.
    """
    flags = {name: value for name, value in overrides.items() if value is not None}
    wrong = _unknown_variables()
    try:
        settings = cls(**flags)  # type: ignore[arg-type]  # pydantic checks the values
    except ValidationError as error:
        wrong += [_problem(item, flags) for item in error.errors(include_url=False)]
    if wrong:
        raise SettingsInvalid("; ".join(wrong))
    return settings


def read_flags(
    cls: type[AnySettings],
    parser: ArgumentParser,
    texts: Mapping[str, str],
    arguments: Sequence[str] | None = None,
) -> AnySettings:
    """Read settings from flags, each with its text, and those of both services, as `load_settings` does."""
    for name, text in texts.items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, help=text.replace("%", "%%"))
    lists = {
        "local_roots": ("--local-root", "Folder from which LOCAL repositories may be read; repeatable."),
        "allowed_hosts": (
            "--allow-host",
            "Host that REMOTE_URL and OCI may reach though its address is not public; repeatable.",
        ),
    }
    for name, (flag, text) in lists.items():
        parser.add_argument(flag, dest=name, action="append", help=text)
    insecure = cls.model_fields["insecure"].description
    parser.add_argument("--insecure", action="store_true", default=None, help=insecure)
    flags = vars(parser.parse_args(arguments))
    return load_settings(cls, **flags | {name: tuple(flags[name]) for name in lists if flags[name]})


def require_triton(backend: str) -> None:
    """Raise SettingsInvalid where the kernels for GPUs are to run and Triton is not installed."""
    if find_spec("triton") is None:
        raise SettingsInvalid(
            f"{variable('backend')}={backend} needs Triton: pip install 'loramux[gpu]', or set torch."
        )


def variable(name: str) -> str:
    """Return the variable that holds a setting."""
    return PREFIX + name.upper()


def _unknown_variables() -> list[str]:
    known = sorted(name.upper() for name in {**BuilderSettings.model_fields, **InferenceSettings.model_fields})
    wrong = []
    for name, value in sorted(os.environ.items()):
        if not name.upper().startswith(PREFIX) or name.startswith(SECRET_PREFIX):
            continue
        bare = name.upper().removeprefix(PREFIX)
        if bare in (*known, *CLIENT_VARIABLES) or _is_service_link(bare, value):
            continue
        near = nearest(bare, known)
        cure = f"did you mean {PREFIX}{near}?" if near else f"known are {', '.join(map(variable, known))}"
        wrong.append(f"{name}: unknown setting, {cure}")
    return wrong


def _is_service_link(name: str, value: str) -> bool:
    """True for what Kubernetes sets in every pod beside a service whose name begins with loramux."""
    return value.startswith(("tcp://", "udp://", "sctp://")) or bool(
        re.fullmatch(r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)_\w+)", name)
    )


def _problem(item: Any, flags: dict[str, object]) -> str:
    name = str(item["loc"][0])
    spelled = f"--{name.replace('_', '-')}" if name in flags else variable(name)
    if item["type"] == "missing":
        return f"{spelled} is not set; set it, or give --{name.replace('_', '-')}"
    if item["type"] == "extra_forbidden":
        near = nearest(name, {**BuilderSettings.model_fields, **InferenceSettings.model_fields})
        return f"{name}: unknown setting" + (f", did you mean {near}?" if near else "")
    value = re.sub(r"//[^/]*@", "//***@", str(item["input"]).partition("-----BEGIN")[0])
    return f"{spelled}={value}: expected {expected_of(item['msg'])}"
