"""What operators with kernels in C++ share."""

import pytest
import torch

from sere_compile.ops.native import FLOAT_NUMBERS, compiled_ahead


def test_while_aotinductor_traces_nothing_compiled_at_first_use_is_taken():
    """Its packages run without Python."""
    from torch._inductor.virtualized import V

    assert not compiled_ahead()
    with V.set_aot_compilation(True):
        assert compiled_ahead()
    assert not compiled_ahead()


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)])
def test_numbers_of_floats(dtype, size):
    """The kernels tell 32 from 16 bits by them, and bf16 from fp16."""
    assert (4 if FLOAT_NUMBERS[dtype] == 0 else 2) == size
    assert len(set(FLOAT_NUMBERS.values())) == 3
