"""What kernels in CUDA C++ are compiled and launched by, as far as it can be seen without a GPU.

On a GPU every test of the kernels goes through it: test_expert_mlp_stream.py, test_fill.py.
"""

import ctypes

import pytest
import torch

from sere_compile.ops.cuda import nvrtc


def test_a_torch_without_nvrtc_is_told(monkeypatch):
    """The operators take Triton then."""

    def missing():
        raise OSError("libcaffe2_nvrtc.so: cannot open shared object file")

    monkeypatch.setattr(nvrtc, "_library", missing)
    assert nvrtc.available() is False
    monkeypatch.setattr(nvrtc, "_library", lambda: object())
    assert nvrtc.available() is False


def test_whom_kernels_are_for(monkeypatch):
    """CUDA devices of Hopper and later, where torch brings the compiler; no CPU, no AMD."""
    nvrtc.serves.cache_clear()
    assert not nvrtc.serves(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nvrtc, "available", lambda: True)
    for capability, serves in (((8, 9), False), ((9, 0), True), ((12, 0), True)):
        nvrtc.serves.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, is_of=capability: is_of)
        assert nvrtc.serves(torch.device("cuda")) is serves
    nvrtc.serves.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not nvrtc.serves(torch.device("cuda"))
    nvrtc.serves.cache_clear()


def test_arguments_as_kernels_take_them():
    """Pointers of tensors, null for none, ints and floats of four bytes; a bool is an int."""
    tensor = torch.zeros(3)
    values = [nvrtc._value(a) for a in (tensor, None, 7, 0.5, True)]
    assert [type(v) for v in values] == [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int
    ]  # fmt: skip
    assert [v.value for v in values] == [tensor.data_ptr(), None, 7, 0.5, 1]


def test_structures_are_the_drivers():
    """Sizes and places of CUlaunchAttribute and CUlaunchConfig, as cuda.h has them."""
    attribute, config = nvrtc._Attribute, nvrtc._LaunchConfig
    assert (ctypes.sizeof(attribute), attribute.value.offset) == (72, 8)
    places = [getattr(config, name).offset for name, _ in config._fields_]
    assert (ctypes.sizeof(config), places) == (56, [0, 12, 24, 32, 40, 48])


@pytest.mark.parametrize(
    ("early", "cluster", "want"), [(False, 0, []), (True, 0, [6]), (False, 4, [4]), (True, 8, [6, 4])]
)
def test_what_a_launch_asks_for(monkeypatch, early, cluster, want):
    """An early start, a cluster, both or neither; nothing else is in the attributes that count."""
    seen = {}

    class Driver:
        @staticmethod
        def cuLaunchKernelEx(config, function, pointers, extra):
            one = config._obj
            asked = [one.attributes[i] for i in range(one.num_attributes)]
            seen["ids"] = [a.id for a in asked]
            seen["values"] = [list(a.value) for a in asked]
            seen["grid"], seen["block"], seen["shared"] = list(one.grid), list(one.block), one.shared_bytes
            return 0

    stream = type("Stream", (), {"cuda_stream": 0})
    monkeypatch.setattr(nvrtc, "_library", lambda: Driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    nvrtc.launch(ctypes.c_void_p(1), (8, 2), 128, 64, (1, 2.0, None), early, cluster)
    assert seen["ids"] == want
    assert all(v == [1, 0, 0] if i == 6 else v == [cluster, 1, 1] for i, v in zip(want, seen["values"], strict=True))
    assert (seen["grid"], seen["block"], seen["shared"]) == ([8, 2, 1], [128, 1, 1], 64)


def test_a_driver_that_refuses_a_launch_is_an_error(monkeypatch):
    """With its number and the call."""
    driver = type("Driver", (), {"cuLaunchKernelEx": staticmethod(lambda *_: 912)})
    monkeypatch.setattr(nvrtc, "_library", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 0}))
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx: error 912"):
        nvrtc.launch(ctypes.c_void_p(1), (1, 1), 32, 0, (), False)
