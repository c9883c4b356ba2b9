"""Operators of Triton's interpreter between tensors of one type, or with a number: straight to NumPy.

Triton goes through a dozen functions to find that two types are equal and that shapes fit, and makes blocks of
numbers before it adds them; NumPy does as much by itself. What is anything else goes Triton's way: floats of
other types, bfloat16 (whose bits are kept as integers), shapes of different ranks.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
from triton.language import core
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

Method = Callable[[Any, Any], Any]

_FLOATS: Final = {"fp32": np.float32}
_INTEGERS: Final = {"int32": np.int32, "int64": np.int64}
_WHOLE: Final = frozenset(_INTEGERS.values())
_NUMBERS: Final = _FLOATS | _INTEGERS
_BITS: Final = {"int1": np.bool_} | _INTEGERS
_LOADED: Final = {
    name: np.dtype(numbers) for name, numbers in {**_NUMBERS, "fp16": np.float16, "bf16": np.uint16}.items()
}


def _quotient(one: Any, other: Any) -> Any:
    return (one - np.fmod(one, other)) // other  # towards zero, as Triton has it


_ARITHMETIC: Final[dict[str, tuple[Method, dict[str, Any]]]] = {
    "__add__": (np.add, _NUMBERS),
    "__sub__": (np.subtract, _NUMBERS),
    "__mul__": (np.multiply, _NUMBERS),
    "__truediv__": (np.divide, _FLOATS),
    "__floordiv__": (_quotient, _INTEGERS),
    "__mod__": (np.fmod, _INTEGERS),
    "__radd__": (np.add, _NUMBERS),
    "__rmul__": (np.multiply, _NUMBERS),
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
    if name == "to":
        return _converting(slow)
    if name not in _ARITHMETIC:
        return slow
    return _method(*_ARITHMETIC[name], _adding(slow) if name == "__add__" else slow)


def loading(slow: Callable[..., Any]) -> Callable[..., Any]:
    """Return a quicker ``tl.load`` of numbers, with a mask of the pointers' shape and a number beside it."""

    def load(pointer: Any, mask: Any = None, other: Any = None, **how: Any) -> Any:
        kind, data = pointer.dtype, pointer.handle.data
        element = kind.element_ty if kind.is_ptr() else None
        numbers = None if element is None else _LOADED.get(element.name)
        fits = type(mask) is core.tensor and mask.handle.data.shape == data.shape
        if numbers is None or not (fits or mask is None) or how.get("volatile"):
            return slow(pointer, mask, other, **how)
        value = other.value if type(other) is core.constexpr else other
        if value is not None and (type(value) not in (int, float) or mask is None):
            return slow(pointer, mask, other, **how)
        if value and element.name == "bf16":  # kept as bits
            return slow(pointer, mask, other, **how)
        there = np.ones(data.shape, np.bool_) if mask is None else mask.handle.data
        found = interpreter._interpreter.load(data, there, np.full(data.shape, value or 0, numbers), numbers)
        result = block_of(element, pointer.type.shape.values) if pointer.type.is_block() else element
        return core.tensor(TensorHandle(found, element), result)

    return load


def _converting(slow: Callable[..., Any]) -> Callable[..., Any]:
    def to(one: Any, dtype: Any, *how: Any, **more: Any) -> Any:
        kind = dtype.value if type(dtype) is core.constexpr else dtype
        if how or more or type(kind) is not core.dtype:
            return slow(one, dtype, *how, **more)
        if one.dtype.name == kind.name:
            return one
        numbers = _NUMBERS.get(kind.name)
        if numbers is None or one.dtype.name not in _NUMBERS:
            return slow(one, dtype)
        result = block_of(kind, one.type.shape.values) if one.type.is_block() else kind
        return core.tensor(TensorHandle(one.handle.data.astype(numbers), kind), result)

    return to


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
    """Return an indexing that handles ``x[:, None]``."""

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
    """Return a number for use beside a tensor; None where Triton has to decide."""
    if type(value) is core.constexpr:
        value = value.value
    if numbers is np.bool_:
        return np.bool_(value) if type(value) is bool else None
    if type(value) is int:
        bits = 31 if numbers is np.int32 else 63
        return numbers(value) if -(1 << bits) <= value < 1 << bits else None
    return numbers(value) if type(value) is float and numbers is np.float32 else None
