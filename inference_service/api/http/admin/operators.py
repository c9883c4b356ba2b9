"""Routes for operators' changes of adapters: vLLM's two, and ours for the page."""

from typing import Annotated, ClassVar, Final, Literal, NotRequired, cast

from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from typing_extensions import TypedDict

from inference_service.adapters.manager import MAX_PAGE, MAX_TOKEN, PAGE, AdapterManager
from inference_service.api.http.wire.body import Body, Examples, Query, read_body, read_query
from inference_service.api.http.wire.errors import Error, error_body, headers_of, status_of
from inference_service.api.http.wire.reply import Reply
from inference_service.api.requests.service import GenerationService
from loramux_shared.faults import AdapterExists, Fault, PermissionDenied
from loramux_shared.operations import AdapterStatus, ReplicaStatus
from loramux_shared.rpc.stopping import shielded

VLLM_TYPES: Final = {400: "BadRequestError", 404: "NotFoundError"}
"""Other statuses have the reason of the fault."""
Name = Annotated[str, Field(min_length=1, max_length=256)]
Path = Annotated[str, Field(min_length=1, max_length=4096)]


class LoadBody(Body):
    """vLLM's request for an adapter."""

    examples: ClassVar[Examples] = {"repository": {"lora_name": "support", "lora_path": "my-org/support-lora"}}

    lora_name: Name
    lora_path: Path
    """A repository, a bucket, an address, a path of the builder's machine, or ``bundle:DIGEST``."""
    load_inplace: bool | None = None
    """Replace the version of an existing name."""


class UnloadBody(Body):
    """vLLM's request to remove an adapter."""

    examples: ClassVar[Examples] = {"name": {"lora_name": "support"}}

    lora_name: Name
    lora_int_id: int | None = None
    """Accepted; adapters have no numbers here."""


class RollbackBody(Body):
    """The generation that is to be served again."""

    examples: ClassVar[Examples] = {"before": {}, "number": {"to": 7}}

    to: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    """Unset: the one before the served one."""


class PageQuery(Query):
    """The page of the list of adapters."""

    page_size: Annotated[int, Field(ge=1, le=MAX_PAGE)] = PAGE
    page_token: Annotated[str, Field(json_schema_extra={"maxLength": MAX_TOKEN})] = ""
    """The `next_page_token` of the page before."""


class VllmError(Error):
    """The same with the fields that vLLM's clients read, which a refused key does not get."""

    object: NotRequired[Literal["error"]]
    message: NotRequired[str]
    type: NotRequired[str]
    param: NotRequired[str | None]
    code: NotRequired[int]


class Failure(TypedDict):
    """Why an adapter is refused (MODEL_UNUSABLE), or why its last load failed."""

    reason: str
    message: str


class Adapter(TypedDict):
    """An adapter and its tier."""

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
    """The relation of the replica to its deployment (fixed, current, stale, blind), and the content of its
    bank.
    """

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
    """The generation that is served now: a new one with the content of the older one."""

    generation: int


def manager_of(http: HttpRequest) -> AdapterManager:
    """Return the manager that the application was made with."""
    manager: AdapterManager = http.app.state.adapters
    return manager


def refuse_other_sites(http: HttpRequest) -> None:
    """Raise PermissionDenied for what a page of another site has a browser send; needed without JSON alone."""
    if http.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise PermissionDenied("requests from pages of other sites are refused. Use this server's own page.")


async def load_lora_adapter(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
    """Add or replace an adapter; returns when it is served."""
    body = await read_body(http, LoadBody)
    try:
        loaded = await manager_of(http).load(body.lora_name, body.lora_path, replace=bool(body.load_inplace))
    except Fault as fault:
        return _refused(fault)
    alone = "" if loaded.everywhere else " It is in this replica alone, and not in the deployment."
    headers = {
        "x-loramux-digest": loaded.adapter.digest,
        "x-loramux-generation": str(loaded.adapter.generation),
    }
    message = f"Success: LoRA adapter '{body.lora_name}' added successfully.{alone}"
    return PlainTextResponse(message, headers=headers)


async def unload_lora_adapter(service: GenerationService, http: HttpRequest) -> Response:  # noqa: ARG001
    """Remove an adapter; returns when the replica has stopped serving it."""
    body = await read_body(http, UnloadBody)
    try:
        await manager_of(http).unload(body.lora_name)
    except Fault as fault:
        return _refused(fault)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _refused(fault: Fault) -> Reply[VllmError]:
    """Return a fault with the fields that OpenAI's clients read, and those that vLLM's read."""
    status = 400 if isinstance(fault, AdapterExists) else status_of(fault)
    kind = "InvalidUserInput" if isinstance(fault, AdapterExists) else VLLM_TYPES.get(status, fault.reason)
    error = error_body(fault)["error"]
    body: VllmError = {
        "error": error,
        "object": "error",
        "message": error["message"],
        "type": kind,
        "param": None,
        "code": status,
    }
    return Reply(body, status, headers_of(fault, status_of(fault)))


async def list_adapters(service: GenerationService, http: HttpRequest) -> Reply[AdapterList]:  # noqa: ARG001
    """List adapters with their tiers, a page at a time, and the state of the replica."""
    manager, query = manager_of(http), read_query(http, PageQuery)
    page = manager.list(query.page_token, query.page_size)
    return Reply(
        {
            "object": "list",
            "data": [_adapter(view) for view in page.adapters],
            "next_page_token": page.next_page,
            "replica": _replica(manager.replica()),
        }
    )


async def pin_adapter(service: GenerationService, http: HttpRequest) -> Reply[Adapter]:  # noqa: ARG001
    """Keep an adapter resident, in its present version."""
    refuse_other_sites(http)
    return Reply(_adapter(manager_of(http).pin(http.path_params["name"])))


async def unpin_adapter(service: GenerationService, http: HttpRequest) -> Reply[Adapter]:  # noqa: ARG001
    """Allow an adapter to be evicted again."""
    refuse_other_sites(http)
    return Reply(_adapter(manager_of(http).unpin(http.path_params["name"])))


async def roll_back(service: GenerationService, http: HttpRequest) -> Reply[RolledBack]:  # noqa: ARG001
    """Publish an older generation again; returns when it is served."""
    body = await read_body(http, RollbackBody)
    # The rollback continues when its client disconnects: a published generation is served.
    generation = await shielded(manager_of(http).roll_back(body.to))
    return Reply({"generation": generation})


def failure_of(fault: Fault | None) -> Failure | None:
    """Return why an adapter is not served."""
    return None if fault is None else {"reason": fault.reason, "message": fault.message}


def _adapter(view: AdapterStatus) -> Adapter:
    return {
        "id": view.name,
        "object": "adapter",
        "digest": view.digest,
        "resident_digest": view.resident_digest or None,
        "generation": view.generation,
        "tier": view.tier,
        "residency": view.residency,
        "pinned": view.pinned,
        "in_flight": view.in_flight,
        "waiting": view.waiting,
        "bytes": view.num_bytes,
        "last_used": int(view.last_used.timestamp()) if view.last_used else None,
        "last_failure": failure_of(view.last_failure),
        "only_here": view.only_here,
    }


def _replica(view: ReplicaStatus) -> Replica:
    return cast(Replica, {name: getattr(view, name) for name in Replica.__annotations__})
