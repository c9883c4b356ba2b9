"""Triton's interpreter without repeated work: a fraction of the time, and the same bits.

At every launch, and at every call of ``tl.sum`` or another helper, it looks for the builtins among all names of
its language and patches them, and copies what lies on the CPU onto itself; at every operation it makes the same
types and constants again, decides what operands of one type and shape become, and computes in 64 bits whether
integers overflow, of which it says nothing. Here it looks once, patches once for each launch, keeps types and
constants, and leaves the rest.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial, partialmethod
from math import prod
from types import ModuleType
from typing import Any, Final

import numpy as np
import triton
from torch import Tensor
from triton import language
from triton.language import core
from triton.runtime import interpreter

KNOWN: Final = "3.9."
"""Releases whose inside is the one that is changed here; others are left as they are."""


_WRAPPER: Final = core.builtin(lambda: None).__code__
_INTEGERS: Final = frozenset(core.dtype.SINT_TYPES + core.dtype.UINT_TYPES)
_NUMBERS: Final = _INTEGERS - {"int1"} | {"fp32", "fp64"}
"""Two operands of such a type have it in every operation, and so has one beside a small whole number."""
_AS_THEY_ARE: Final = frozenset(
    (core.tensor, int, float, bool, str, type(None), core.dtype, core.block_type, core.pointer_type)
)
_unwrap: Final = core._unwrap_if_constexpr
_first_block: Final = core.block_type.__init__


def quicken() -> bool:
    """Do so in this process; return whether it is done."""
    if triton.__version__.startswith(KNOWN) and not isinstance(interpreter._patch_lang, _Patch):
        interpreter._patch_lang = _Patch(interpreter._patch_lang)
        interpreter._patch_builtin = _patch_builtins
        interpreter._get_np_dtype = partial(_dtype, cache(interpreter._get_np_dtype))
        semantic = interpreter.interpreter_semantic
        semantic.builder.options = replace(semantic.builder.options, sanitize_overflow=False)
        semantic.broadcast_impl_value = partial(_broadcast, semantic.broadcast_impl_value)
        semantic.binary_op_type_checking_impl = partial(_operands, semantic.binary_op_type_checking_impl)
        for kind in (core.dtype, core.pointer_type, core.block_type):
            kind.__eq__ = _equal(kind.__eq__)
        core.dtype.is_int = lambda self: self.name in _INTEGERS
        core._unwrap_if_constexpr = _unwrapped
        core.block_type.__init__ = _make_block
        core.block_type.with_element_ty = _with_element
        core.block_type.to_ir = lambda self, _: self
        core.tensor.__init__ = _make_tensor
        interpreter.TensorHandle.__init__ = _make_handle
        interpreter.InterpretedFunction.run = partialmethod(_run, interpreter.InterpretedFunction.run)
    return isinstance(interpreter._patch_lang, _Patch)


class _Patch:
    """Patches what a function sees of the language, where the launch that is under way has not yet."""

    def __init__(self, patch: Callable[[Any], Any]) -> None:
        self._patch = patch
        self._known: dict[frozenset[str], list[tuple[Any, str, Any, Any]]] = {}
        self._under_way: list[frozenset[str]] = []

    def __call__(self, function: Any) -> Any:
        """Patch; return the function that reverts the patches."""
        seen = _languages(function)
        if not any(seen <= patched for patched in self._under_way):
            self._under_way.append(seen)
            for place, name, _, interpreted in self._changes(seen, function):
                setattr(place, name, interpreted)
        return self

    def restore(self) -> None:
        while self._under_way:
            for place, name, original, _ in self._known[self._under_way.pop()]:
                if original is interpreter._MISSING:
                    delattr(place, name)
                else:
                    setattr(place, name, original)

    def _changes(self, seen: frozenset[str], function: Any) -> list[tuple[Any, str, Any, Any]]:
        """Return the changes: the place, the name, the old value and the one while a kernel runs."""
        if seen not in self._known:
            scope = self._patch(function)
            first = {(id(place), name): (place, name, was) for place, name, was in reversed(scope._changes)}
            self._known[seen] = [(*change, getattr(*change[:2])) for change in first.values()]
            scope.restore()
        return self._known[seen]


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
    """Return a package's builtins in the state while a kernel runs."""
    return [(name, _with_semantic(member)) for name, member in _builtins(package)]


def _with_semantic(member: Callable[..., Any]) -> Callable[..., Any]:
    # what `builtin` wraps a function in looks only for this argument
    function = inspect.unwrap(member, stop=lambda each: each.__code__ is not _WRAPPER)

    def interpreted(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return function(*args, **kwargs)

    return interpreted


def _dtype(of_scalar: Callable[[Any], Any], kind: Any) -> Any:
    """Return the type of NumPy for a type of Triton."""
    kind = kind.scalar
    return of_scalar(core.uint64 if kind.is_ptr() else kind)


def _unwrapped(value: Any) -> Any:
    kind = type(value)
    if kind in _AS_THEY_ARE:
        return value
    return value.value if kind is core.constexpr else _unwrap(value)


def _equal(slow: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda one, other: one is other or slow(one, other)


def _broadcast(different: Callable[[Any, Any], Any], one: Any, other: Any) -> Any:
    blocks = one.type.is_block(), other.type.is_block()
    if not any(blocks) or (all(blocks) and one.type.shape.values == other.type.shape.values):
        return one, other
    return different(one, other)


def _operands(slow: Callable[..., Any], one: Any, other: Any, *rules: bool, **named: bool) -> Any:
    """Return the operands in their common type and shape; rules are whether the first and the second may be
    pointers, whether this is arithmetic, and whether it divides.
    """
    if type(one) is core.tensor and type(other) is core.tensor:
        kind, its = one.dtype.name, other.dtype.name
        if (kind == its and kind in _NUMBERS) or (
            rules[:1] == (True,) and one.dtype.is_ptr() and its in _INTEGERS
        ):
            return interpreter.interpreter_semantic.broadcast_impl_value(one, other)
    elif len(rules) < 3 or rules[2]:
        if type(one) is core.tensor and _is_small(other, one.dtype.name):
            return one, _constant(other, one.dtype, *(size.value for size in one.shape))
        if type(other) is core.tensor and _is_small(one, other.dtype.name):
            return _constant(one, other.dtype, *(size.value for size in other.shape)), other
    return slow(one, other, *rules, **named)


def _is_small(value: Any, kind: str) -> bool:
    if type(value) is int:
        return 0 <= value < 128 and kind in _NUMBERS
    return type(value) is float and value != 0 and kind in ("fp32", "fp64")


@cache
def _constant(value: float, kind: Any, *shape: int) -> Any:
    semantic = interpreter.interpreter_semantic
    one = semantic.scalar_constant(value, kind)
    return semantic.splat(one, shape) if shape else one


_BLOCKS: Final[dict[tuple[int, ...], dict[str, Any]]] = {}
"""Element types, shapes and sizes of block types, by the element's identity, which they keep, and the shape."""


def _make_block(block: Any, element: Any, shape: Any) -> None:
    if not all(type(size) is int for size in shape):
        _first_block(block, element, shape)
        return
    key = (id(element), *shape)
    if key not in _BLOCKS:
        _first_block(block, element, shape)
        _BLOCKS[key] = dict(block.__dict__)
    block.__dict__.update(_BLOCKS[key])


def _with_element(block: Any, element: Any) -> Any:
    if element.is_ptr():
        return _pointers(element.element_ty, element.address_space, element.const, *block.shape.values)
    return _block(element, *block.shape.values)


@cache
def _pointers(element: Any, space: str, const: bool, *shape: int) -> Any:
    return core.block_type(core.pointer_type(element, space, const), [*shape])


@cache
def _block(element: Any, *shape: int) -> Any:
    return core.block_type(element, [*shape])


def _make_tensor(tensor: Any, handle: Any, kind: Any) -> None:
    tensor.handle, tensor.type, tensor.dtype = handle, kind, kind.scalar
    tensor.numel, tensor.shape = _sizes(*kind.shape.values) if kind.is_block() else _sizes()


@cache
def _sizes(*shape: int) -> tuple[Any, Any]:
    return core.constexpr(prod(shape)), core.tuple([core.constexpr(size) for size in shape])


def _make_handle(handle: Any, data: Any, dtype: Any) -> None:
    handle.data, handle.dtype, handle.attr = data, dtype, {}


def _run(
    function: Any, slow: Callable[..., Any], *provided: Any, grid: Any, warmup: bool, **named: Any
) -> None:
    """Launch a kernel on tensors where they are; those of a GPU are copied, as Triton does."""
    values = [*provided, *named.values()]
    if warmup or function.pre_run_hooks or not all(map(_is_here, values)):
        slow(function, *provided, grid=grid, warmup=warmup, **named)
        return
    kernel = function.rewrite()
    names, defaults, constants = _parameters(kernel)
    bound = defaults | dict(zip(names, provided, strict=False))
    bound |= {name: value for name, value in named.items() if name in names}
    scope = interpreter._patch_lang(kernel)
    try:
        arguments = {name: value if name in constants else _converted(value) for name, value in bound.items()}
        sizes = grid(arguments) if callable(grid) else grid
        _over_grid(kernel, arguments, (*sizes, 1, 1)[:3])
    finally:
        scope.restore()


def _over_grid(kernel: Any, arguments: dict[str, Any], sizes: tuple[int, int, int]) -> None:
    interpreter.interpreter_builder.set_grid_dim(*sizes)
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # a GPU says nothing of infinities in rows that pad
            for place in np.ndindex(*sizes):
                interpreter.interpreter_builder.set_grid_idx(*place)
                kernel(**arguments)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def _is_here(value: Any) -> bool:
    return value.device.type == "cpu" if isinstance(value, Tensor) else value is None or type(value) in _PLAIN


_PLAIN: Final = frozenset((int, float, bool, str, core.dtype, core.constexpr))


@cache
def _parameters(kernel: Any) -> tuple[list[str], dict[str, Any], frozenset[str]]:
    """Names, defaults, and which are known when a kernel is compiled."""
    of_kernel = inspect.signature(kernel).parameters
    defaults = {name: each.default for name, each in of_kernel.items() if each.default is not each.empty}
    executor = interpreter.GridExecutor(kernel, [*of_kernel], None)
    return [*of_kernel], defaults, frozenset(executor.constexprs)


def _converted(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return interpreter._implicit_cvt(value)
    kind = _pointer_to(value.dtype)
    address = np.array([value.data_ptr()], dtype=np.uint64)
    return core.tensor(interpreter.TensorHandle(address, kind), kind)


@cache
def _pointer_to(dtype: Any) -> Any:
    return interpreter._implicit_cvt(Tensor([]).to(dtype)).type
