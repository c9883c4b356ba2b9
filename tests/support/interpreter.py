"""Triton's interpreter, without what it does again and again: a fifth of the time, and the same bits.

At every launch, and at every call of ``tl.sum`` or another helper, it looks for the builtins among all names
of its language and patches them; at every operation it makes the same types anew, broadcasts shapes that are
equal, and computes in 64 bits whether integers overflow, of which it says nothing. Here it looks once, patches
once for each launch, keeps types, and leaves the rest; operators are those of `interpreted_operators`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from math import prod
from types import ModuleType
from typing import Any, Final

import triton
from triton import language
from triton.language import core
from triton.runtime import interpreter

from tests.support.interpreted_operators import block_of, straight

KNOWN: Final = "3.9."
"""Releases whose inside is the one that is changed here; others are left as they are."""


_WRAPPER: Final = core.builtin(lambda: None).__code__


def quicken() -> bool:
    """Do so in this process; return whether it is done."""
    if triton.__version__.startswith(KNOWN) and not isinstance(interpreter._patch_lang, _Patch):
        interpreter._patch_lang = _Patch(interpreter._patch_lang)
        interpreter._patch_builtin = _patch_builtins
        interpreter._get_np_dtype = partial(_dtype, cache(interpreter._get_np_dtype))
        semantic = interpreter.interpreter_semantic
        semantic.builder.options = replace(semantic.builder.options, sanitize_overflow=False)
        semantic.broadcast_impl_value = partial(_broadcast, semantic.broadcast_impl_value)
        core.block_type.with_element_ty = _with_element
        core.block_type.to_ir = lambda self, _: self
        core.tensor.__init__ = _make_tensor
    return isinstance(interpreter._patch_lang, _Patch)


class _Patch:
    """Patches what a function sees of the language, where the launch that is under way has not yet."""

    def __init__(self, patch: Callable[[Any], Any]) -> None:
        self._patch = patch
        self._scope: Any = None
        self._patched: set[str] = set()

    def __call__(self, function: Any) -> Any:
        """Patch; return what takes it all back."""
        seen = _languages(function)
        if self._scope is None:
            self._scope = self._patch(function)
            self._scope.restore = partial(self._restore, self._scope.restore)
        elif not seen <= self._patched:
            self._scope._changes += self._patch(function)._changes
        self._patched |= seen
        return self._scope

    def _restore(self, restore: Callable[[], None]) -> None:
        self._scope = None
        self._patched.clear()
        restore()


@cache
def _languages(function: Any) -> frozenset[str]:
    modules = [value for value in function.__globals__.values() if isinstance(value, ModuleType)]
    return frozenset(module.__name__ for module in modules if module in (language, core))


@cache
def _builtins(package: Any) -> list[tuple[str, Any]]:
    return inspect.getmembers(package, core.is_builtin)


def _patch_builtins(package: Any, builder: Any, scope: Any) -> None:
    for name, interpreted in _interpreted(package):
        scope.set_attr(package, name, interpreted)


@cache
def _interpreted(package: Any) -> list[tuple[str, Callable[..., Any]]]:
    """What a package's builtins are while a kernel runs."""
    made = [(name, _with_semantic(member)) for name, member in _builtins(package)]
    return [(name, straight(name, slow)) for name, slow in made] if package is core.tensor else made


def _with_semantic(member: Callable[..., Any]) -> Callable[..., Any]:
    # what `builtin` wraps a function in looks only for this argument
    function = inspect.unwrap(member, stop=lambda each: each.__code__ is not _WRAPPER)

    def interpreted(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return function(*args, **kwargs)

    return interpreted


def _dtype(of_scalar: Callable[[Any], Any], kind: Any) -> Any:
    """That of NumPy for a type of Triton."""
    kind = kind.scalar
    return of_scalar(core.uint64 if kind.is_ptr() else kind)


def _broadcast(different: Callable[[Any, Any], Any], one: Any, other: Any) -> Any:
    if one.type.is_block() and other.type.is_block() and one.type.shape.values == other.type.shape.values:
        return one, other
    return different(one, other)


def _with_element(block: Any, element: Any) -> Any:
    return block_of(element, block.shape.values)


def _make_tensor(tensor: Any, handle: Any, kind: Any) -> None:
    tensor.handle, tensor.type, tensor.dtype = handle, kind, kind.scalar
    tensor.numel, tensor.shape = _sizes(*kind.shape.values) if kind.is_block() else _sizes()


@cache
def _sizes(*shape: int) -> tuple[Any, Any]:
    return core.constexpr(prod(shape)), core.tuple([core.constexpr(size) for size in shape])
