"""What the benchmark of MXFP4 kernels times; that it runs takes a GPU (`.ci/gpu`)."""

import re

import torch

from benchmarks.ops import bench_mxfp4
from sere_compile.benchmark.geometries import GEOMETRIES
from sere_compile.ops.expert_mlp.mxfp4 import unpack_mxfp4
from sere_compile.ops.expert_mlp.tiles import launch_config

OSS = GEOMETRIES["gpt-oss-20b"]


def test_tiles():
    """Each once, those with `swap` as wide as a wgmma, and the ones in use among them."""
    found = dict(bench_mxfp4.tiles())
    configs = list(found.values())
    assert len(set(configs)) == len(configs) > 20
    assert all(config.gate_up.block_n == 64 for config in configs if config.gate_up.swap)
    assert launch_config(torch.bfloat16, False, mxfp4=True) in configs


def test_random_layers_are_in_the_operators_format(monkeypatch):
    monkeypatch.setattr(bench_mxfp4, "DEVICE", "meta")
    gate_up, down, *biases = bench_mxfp4.make_packed(OSS)
    assert [unpack_mxfp4(*pair).shape for pair in (gate_up, down)] == [(32, 5760, 2880), (32, 2880, 2880)]
    assert [bias.shape for bias in biases] == [(32, 5760), (32, 2880)]
    assert bench_mxfp4.BYTES == (0.5 * 32 + 1) / 32


def test_variants_begin_with_those_in_16_bits(monkeypatch):
    monkeypatch.setattr(bench_mxfp4, "DEVICE", "meta")
    packed = bench_mxfp4.make_packed(OSS)
    monkeypatch.setattr(bench_mxfp4, "vllm_experts", lambda packed: None)
    names = list(bench_mxfp4.variants(OSS, packed, re.compile("use")))
    assert names == ["bf16", "in use"]
