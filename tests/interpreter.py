"""Triton's interpreter without the work it repeats: the same results, in a third of the time.

It runs each operation in Python, and most of a test's time goes to three things that need no repeating. Each is left
as it is where another version of Triton has no such place.
"""

from __future__ import annotations

import functools

import numpy as np


def quicken() -> None:
    """Replace what the interpreter computes again and again."""
    from triton.runtime import interpreter

    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _of_scalars(interpreter._get_np_dtype)
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _once(interpreter._patch_lang, interpreter._LangPatchScope)
    if hasattr(interpreter, "ReduceOps"):
        interpreter.ReduceOps.generic_reduce = _by_slices(interpreter.ReduceOps.generic_reduce)


def _of_scalars(get_np_dtype):
    """It makes a dictionary of every dtype, for each operation. Types of blocks and pointers have no hash."""
    cached = functools.cache(get_np_dtype)

    def np_dtype(dtype):
        scalar = dtype.scalar
        return get_np_dtype(scalar) if scalar.is_ptr() else cached(scalar)

    return np_dtype


def _once(patch_lang, scope_of):
    """A launch exchanges the functions of `tl`; each function it calls would look for them once more."""
    import triton.language as tl

    def patched(fn):
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return scope_of()
        return patch_lang(fn)

    return patched


def _by_slices(generic_reduce):
    """Combine functions work on one element each, and on many alike: a step per index of the axis, not per element."""

    def reduce(self, inputs):
        if self.axis is None or len(inputs) != 1:
            return generic_reduce(self, inputs)
        (value,) = inputs
        data = value.handle.data
        total = self.to_tensor(np.take(data, 0, self.axis), value.dtype)
        for index in range(1, data.shape[self.axis]):
            total = self.combine_fn.fn(total, self.to_tensor(np.take(data, index, self.axis), value.dtype))
        result = total.handle.data.reshape(np.take(data, 0, self.axis).shape)
        if self.keep_dims:
            result = np.expand_dims(result, self.axis)
        return [self.to_tensor(result, value.dtype)]

    return reduce
