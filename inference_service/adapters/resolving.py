"""The port of what adds adapters that requests name."""

from collections.abc import Callable
from dataclasses import dataclass

from inference_service.adapters.catalog import Catalog
from inference_service.adapters.manager import AdapterManager
from inference_service.adapters.ports import Resolver
from loramux_shared.storage.base import Store


@dataclass(frozen=True)
class ResolverOpener:
    """Opens a resolver."""

    open_resolver: Callable[[AdapterManager, Catalog, Store], Resolver]
