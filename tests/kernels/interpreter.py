"""Triton 3.6's interpreter, mended: import this, with TRITON_INTERPRET=1 set, before anything is run in it.

As it comes it cuts off what fp32 has beyond bf16, multiplies the bits of bf16 as if they were integers, makes integers
the bits of bf16 instead of its numbers, and fails at loops of a length that a kernel computes, since NumPy 2.4 takes no
array of one number for an integer.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_patch, _convert, _dot, _from_integers = (
    interpreter._patch_lang_tensor,
    interpreter._convert_float,
    interpreter.InterpreterBuilder.create_dot,
    interpreter.InterpreterBuilder.create_si_to_fp,
)


def _patch_with_index(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _convert_rounded(numbers, dtype, target, rounding):
    if (dtype, target) != (tl.float32, tl.bfloat16):
        return _convert(numbers, dtype, target, rounding)
    wide = torch.from_numpy(np.array(numbers, dtype=np.float32))
    return wide.bfloat16().view(torch.int16).numpy().view(np.uint16)


def _dot_wide(self, a, b, d, *options):
    a, b = (self.cast_impl(side, tl.float32) if side.dtype.scalar == tl.bfloat16 else side for side in (a, b))
    return _dot(self, a, b, d, *options)


def _from_integers_wide(self, source, dtype):
    if dtype.scalar != tl.bfloat16:
        return _from_integers(self, source, dtype)
    return self.create_fp_trunc(_from_integers(self, source, dtype.with_element_ty(tl.float32)), dtype)


interpreter._patch_lang_tensor = _patch_with_index
interpreter._convert_float = _convert_rounded
interpreter.InterpreterBuilder.create_dot = _dot_wide
interpreter.InterpreterBuilder.create_si_to_fp = _from_integers_wide
