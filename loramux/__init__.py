"""loramux: one base model, hundreds of LoRA adapters, one server.

What a program imports stands here: the clients, the records that they hand out, `load_deployment`, and the
named failures as ``loramux.faults``. Names are loaded when they are first used: the services import the
generated stubs from this package without the client.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loramux import faults
    from loramux.changes import AdapterChange, ChangeKind, GenerationInfo, PushInfo, RollbackInfo
    from loramux.client import AsyncClient, Client
    from loramux.records import (
        AdapterInfo,
        AdapterReport,
        Choice,
        Completion,
        Delta,
        DeploymentInfo,
        DeploymentState,
        Event,
        Finished,
        FinishReason,
        GenerateOptions,
        Message,
        ModelInfo,
        Prompt,
        PromptLogprobs,
        PromptToken,
        RowReport,
        Stage,
        Started,
        TokenLogprobs,
        Usage,
    )
    from loramux.vectors import Classification, Classifications, Embeddings
    from loramux_shared.deployment import Deployment
    from loramux_shared.deployment_file import load_deployment
    from loramux_shared.operations import AdapterStatus, ReplicaStatus

_HOMES = {
    "loramux.client": ("AsyncClient", "Client"),
    "loramux.changes": ("AdapterChange", "ChangeKind", "GenerationInfo", "PushInfo", "RollbackInfo"),
    "loramux_shared.operations": ("AdapterStatus", "ReplicaStatus"),
    "loramux.vectors": ("Classification", "Classifications", "Embeddings"),
    "loramux_shared.deployment": ("Deployment",),
    "loramux_shared.deployment_file": ("load_deployment",),
}

__all__ = [
    "AdapterChange",
    "AdapterInfo",
    "AdapterReport",
    "AdapterStatus",
    "AsyncClient",
    "ChangeKind",
    "Choice",
    "Classification",
    "Classifications",
    "Client",
    "Completion",
    "Delta",
    "Deployment",
    "DeploymentInfo",
    "DeploymentState",
    "Embeddings",
    "Event",
    "FinishReason",
    "Finished",
    "GenerateOptions",
    "GenerationInfo",
    "Message",
    "ModelInfo",
    "Prompt",
    "PromptLogprobs",
    "PromptToken",
    "PushInfo",
    "ReplicaStatus",
    "RollbackInfo",
    "RowReport",
    "Stage",
    "Started",
    "TokenLogprobs",
    "Usage",
    "faults",
    "load_deployment",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        from loramux_shared.ports import entry_of

        if (added := entry_of("name", name, type)) is not None:
            return added
        raise AttributeError(f"module 'loramux' has no attribute {name!r}")
    if name == "faults":
        return import_module("loramux.faults")
    home = next((home for home, names in _HOMES.items() if name in names), "loramux.records")
    return getattr(import_module(home), name)
