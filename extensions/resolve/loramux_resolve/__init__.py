"""Adapters that requests name by a repository: built when they are first needed, removed when they are idle."""

from loramux_resolve.resolver import Resolver

__all__ = ["Resolver"]
