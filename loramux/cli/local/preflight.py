"""Checks for certain failures, before anything is started or built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from loramux.cli.local.services import local_roots
from loramux.connection import API_KEY, Credentials
from loramux_shared.access.guard import open_guard
from loramux_shared.access.keyring import Keyring
from loramux_shared.access.keys import Scope
from loramux_shared.bundle.generation import current_key
from loramux_shared.deployment import Deployment
from loramux_shared.faults import PermissionDenied, Unauthenticated
from loramux_shared.rpc.options import require_free
from loramux_shared.settings import BuilderSettings, InferenceSettings, load_settings, require_triton
from loramux_shared.storage.base import ObjectMissing
from loramux_shared.storage.open import open_store

WITHOUT_TLS: Final = dict.fromkeys(("tls_cert", "tls_key", "tls_client_ca"))
"""Children are called on loopback, which certificates do not name."""


@dataclass(frozen=True)
class UpPlan:
    """The plan of `loramux up`: services to start, and their addresses."""

    deployment: Deployment
    store: str
    builder: str
    inference: str
    engine: Mapping[str, str | int | None] = field(default_factory=dict)
    """Settings of the inference service that are about speed; None: its default."""
    http: str | None = None
    """Address of the HTTP APIs; None keeps them closed."""
    roots: Sequence[Path] = ()
    """Folders below which LOCAL repositories may lie, beside those that the deployment names."""
    exact: bool = False
    """True if adapters that were added or pushed to the deployment are to leave."""

    @property
    def local_roots(self) -> list[Path]:
        """The folders that the services may read."""
        build = self.deployment.build
        named = local_roots([build.checkpoint_repository, *build.lora_adapters.values()])
        roots = [root.expanduser().resolve() for root in self.roots]
        others = [each for each in named if not any(each.resolve().is_relative_to(root) for root in roots)]
        return list(dict.fromkeys([*others, *roots]))


def preflight(plan: UpPlan) -> None:
    """Look at settings, keys, addresses and the store's credentials.

    Raises:
        SettingsInvalid: a setting, an address or a file of keys or certificates is no good.
        Unauthenticated, PermissionDenied: the services will ask for a key, and ours is none that opens both.
        StoreUnavailable: the store does not let us in.
    """
    name = plan.deployment.model_name
    load_settings(BuilderSettings, store=plan.store, grpc=plan.builder)
    settings = load_settings(
        InferenceSettings, deployment=name, store=plan.store, grpc=plan.inference, http=plan.http, **plan.engine
    )
    if settings.backend == "triton":
        require_triton(settings.backend)
    addresses = [each for each in (plan.builder, plan.inference, plan.http) if each]
    guard = open_guard(settings.model_copy(update=WITHOUT_TLS), *addresses)
    if guard.keyring is not None:
        _require_key(guard.keyring)
    for address in addresses:
        require_free(address)
    with suppress(ObjectMissing):
        open_store(plan.store).get(current_key(name))


def _require_key(keyring: Keyring) -> None:
    """Require a key for both services, since this command calls both."""
    for scope in (Scope.BUILD, Scope.INFER):
        try:
            keyring.authorize(Credentials().api_key, scope)
        except (Unauthenticated, PermissionDenied) as fault:
            raise fault.with_message(
                f"{fault.message} This command calls both services: give it a key with the scopes build and "
                f"infer, as {API_KEY} or --api-key. `loramux keys new --scope build --scope infer --file FILE` "
                "makes one."
            ) from fault
