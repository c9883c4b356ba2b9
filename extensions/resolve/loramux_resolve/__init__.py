"""Adapters that requests name by a repository: built when they are first needed, removed when they are idle."""

from typing import Final

from inference_service.adapters.resolving import ResolverOpener
from loramux_resolve.resolver import Resolver

RESOLVER: Final = ResolverOpener(Resolver)
