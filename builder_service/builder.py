"""A builder without its APIs: its folder, and the parts that build and check."""

import asyncio
from dataclasses import dataclass, replace
from typing import Self

from builder_service.builds.builds import Builds
from builder_service.builds.keeper import BuildLimits
from builder_service.pipeline.check import Checks
from builder_service.pipeline.context import BuildContext, Identity, claim_identity
from loramux_shared.faults import SettingsInvalid
from loramux_shared.settings import BuilderSettings
from loramux_shared.signatures import SigningKey, signed_store
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.base import Store
from loramux_shared.storage.open import open_store


@dataclass(frozen=True)
class Builder:
    """The parts of a builder, made from its settings."""

    context: BuildContext
    identity: Identity
    builds: Builds
    checks: Checks

    @classmethod
    async def open(cls, settings: BuilderSettings) -> Self:
        """Take a work folder, and clear away what builders left there. Raise ResourcesExhausted where there is
        no room for another builder, and what the store does.
        """
        context = BuildContext(
            store=_store(settings),
            sources=open_sources(
                local_roots=settings.local_roots,
                allowed_hosts=settings.allowed_hosts,
                secrets_dir=settings.secrets_dir,
                work_dir=settings.work_dir,
            ),
            work_dir=settings.work_dir,
            parallel_adapters=settings.parallel_adapters,
            max_build_bytes=int(settings.max_build_gb * 1e9) if settings.max_build_gb else None,
        )
        identity = claim_identity(context.place())
        context = replace(context, owner=identity.name)
        await asyncio.to_thread(context.sweep)
        limits = BuildLimits(running=settings.max_concurrent_builds, timeout_s=settings.build_timeout_s)
        return cls(context, identity, Builds(context, limits), Checks(context))


def _store(settings: BuilderSettings) -> Store:
    """Return the store, whose generations are signed where a key is given."""
    if settings.signing_key is None:
        if settings.require_signature or settings.signing_certificates:
            raise SettingsInvalid(
                "LORAMUX_SIGNING_KEY is not set: a builder that requires signatures signs its bundles, too."
            )
        return open_store(settings.store)
    key = SigningKey(settings.signing_key, settings.signing_certificates)
    return signed_store(open_store(settings.store), settings.require_signature, key)
