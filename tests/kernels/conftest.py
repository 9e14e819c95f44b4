"""With `TRITON_INTERPRET=1` (`make check-kernels`), Triton's interpreter runs its kernels here.

It multiplies bfloat16 numbers as if their bits were integers (upstream declined to change that): ``tl.dot`` is mended
here. All else that the kernels do with 16-bit numbers is to load and to store them, which it does rightly.
"""

import os

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    from perl_megatron.kernels import triton_settings

    # Blocks as large as a GPU's: the interpreter takes nearly the same time for each, whatever its size.
    _blocks = triton_settings.Launch(128, 256, 32, warps=8, stages=1)
    triton_settings.INTERPRETER = triton_settings.Settings(_blocks, _blocks)

    _create_dot = interpreter.InterpreterBuilder.create_dot

    def _as_float(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def create_dot(self, first, second, total, *arguments):
        if tl.bfloat16 not in (first.dtype.scalar, second.dtype.scalar):
            return _create_dot(self, first, second, total, *arguments)
        product = np.matmul(_as_float(first), _as_float(second), dtype=np.float32)
        return interpreter.TensorHandle(product + total.data, total.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot

    @pytest.fixture(autouse=True)
    def _masked_out():
        """Both sides of ``tl.where`` are computed, as on a GPU, and what it leaves out may be anything."""
        with np.errstate(invalid="ignore", over="ignore"):
            yield
else:
    collect_ignore = ["test_triton.py"]  # `make check-kernels` runs it
