"""Operators of Triton's interpreter between tensors of one type, or with a number: straight to NumPy.

Triton goes through a dozen functions to find that two types are equal and that shapes fit, and makes blocks of
numbers before it adds them; NumPy does as much by itself. What is anything else goes Triton's way: floats of
other types, bfloat16 (whose bits are kept as integers), shapes of different ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
from triton.language import core
from triton.runtime.interpreter import TensorHandle

Method = Callable[[Any, Any], Any]

_FLOATS: Final = {"fp32": np.float32}
_INTEGERS: Final = {"int32": np.int32, "int64": np.int64}
_WHOLE: Final = frozenset(_INTEGERS.values())
_NUMBERS: Final = _FLOATS | _INTEGERS
_BITS: Final = {"int1": np.bool_} | _INTEGERS


def _quotient(one: Any, other: Any) -> Any:
    return (one - np.fmod(one, other)) // other  # towards zero, as Triton has it


_ARITHMETIC: Final[dict[str, tuple[Method, dict[str, Any]]]] = {
    "__add__": (np.add, _NUMBERS),
    "__sub__": (np.subtract, _NUMBERS),
    "__mul__": (np.multiply, _NUMBERS),
    "__truediv__": (np.divide, _FLOATS),
    "__floordiv__": (_quotient, _INTEGERS),
    "__mod__": (np.fmod, _INTEGERS),
    "__and__": (np.bitwise_and, _BITS),
    "__or__": (np.bitwise_or, _BITS),
}
_COMPARISONS: Final[dict[str, Method]] = {
    "__lt__": np.less,
    "__le__": np.less_equal,
    "__gt__": np.greater,
    "__ge__": np.greater_equal,
    "__eq__": np.equal,
    "__ne__": np.not_equal,
}


def straight(name: str, slow: Method) -> Method:
    """Return a quicker one of a method of tensors; Triton's own where there is none."""
    if name in _COMPARISONS:
        return _method(_COMPARISONS[name], _NUMBERS, slow, compares=True)
    if name == "__getitem__":
        return _with_new_axes(slow)
    if name not in _ARITHMETIC:
        return slow
    return _method(*_ARITHMETIC[name], _adding(slow) if name == "__add__" else slow)


def block_of(element: Any, shape: Any) -> Any:
    """The type of as many elements: always the same one."""
    if element.is_ptr():
        return _pointers(element.element_ty, element.address_space, element.const, *shape)
    return _block(element, *shape)


@cache
def _pointers(element: Any, space: str, const: bool, *shape: int) -> Any:
    return core.block_type(core.pointer_type(element, space, const), [*shape])


@cache
def _block(element: Any, *shape: int) -> Any:
    return core.block_type(element, [*shape])


def _method(compute: Method, kinds: dict[str, Any], slow: Method, *, compares: bool = False) -> Method:
    def operate(one: Any, other: Any) -> Any:
        kind = one.dtype
        numbers = kinds.get(kind.name)
        if numbers is None:
            return slow(one, other)
        if type(other) is core.tensor:
            value, theirs = other.handle.data, other.dtype
            if theirs.name != kind.name:
                if numbers not in _WHOLE or theirs.name not in _INTEGERS:
                    return slow(one, other)
                kind = core.int64
            result = _common(one.type, other.type, kind)
        else:
            value = _constant(numbers, other)
            result = None if value is None else one.type
        if result is None:
            return slow(one, other)
        found = compute(one.handle.data, value)
        if compares:
            result = block_of(core.int1, result.shape.values) if result.is_block() else core.int1
        return core.tensor(TensorHandle(found, kind), result)

    return operate


def _adding(slow: Method) -> Method:
    """Whole numbers to pointers."""

    def add(one: Any, other: Any) -> Any:
        pointer = one.dtype
        if pointer.is_ptr() and type(other) is core.tensor and other.dtype.name in _INTEGERS:
            result = _common(one.type, other.type, pointer)
            if result is not None:
                size = max(1, pointer.element_ty.primitive_bitwidth // 8)
                moved = one.handle.data + size * other.handle.data.astype(np.uint64)
                return core.tensor(TensorHandle(moved, pointer), result)
        return slow(one, other)

    return add


def _with_new_axes(slow: Method) -> Method:
    """As in ``x[:, None]``."""

    def get(one: Any, key: Any) -> Any:
        keys = key if type(key) is tuple else (key,)
        whole = [each for each in keys if each is not None]
        kind = one.type
        if kind.is_block() and whole == [slice(None)] * len(kind.shape.values):
            data = one.handle.data[keys]
            return core.tensor(TensorHandle(data, one.handle.dtype.scalar), block_of(one.dtype, data.shape))
        return slow(one, key)

    return get


def _common(one: Any, other: Any, element: Any) -> Any:
    """The type of both together, of an element: None where Triton has to say."""
    if not other.is_block():
        return block_of(element, one.shape.values) if one.is_block() else element
    theirs = other.shape.values
    if not one.is_block() or one.shape.values == theirs:
        return block_of(element, theirs)
    if len(one.shape.values) != len(theirs):
        return None
    pairs = [*zip(one.shape.values, theirs, strict=True)]
    fit = all(a == b or 1 in (a, b) for a, b in pairs)
    return block_of(element, [max(pair) for pair in pairs]) if fit else None


def _constant(numbers: Any, value: Any) -> Any:
    """A number as it is beside a tensor; None where Triton has to say."""
    if type(value) is core.constexpr:
        value = value.value
    if numbers is np.bool_:
        return np.bool_(value) if type(value) is bool else None
    if type(value) is int:
        bits = 31 if numbers is np.int32 else 63
        return numbers(value) if -(1 << bits) <= value < 1 << bits else None
    return numbers(value) if type(value) is float and numbers is np.float32 else None
