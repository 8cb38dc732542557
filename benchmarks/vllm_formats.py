r"""Writes the table of formats in docs/vllm.md: which expert kernels vLLM chooses, without SERE and with it.

\b
python -m benchmarks.vllm_formats            # where vLLM's CUDA build is installed; no GPU is needed

vLLM's own selection runs, on a platform that says it is a GPU of some compute capability with FlashInfer installed.
Nothing else of vLLM runs: which kernels are chosen is known, not that they work. One process per GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import click

FILE = Path(__file__).parents[1] / "docs" / "vllm.md"
DEVICES = {"H200 (9.0)": (9, 0), "B200 (10.0)": (10, 0)}
HEADS = ("weights", *(f"{device}, {which}" for device in DEVICES for which in ("vLLM", "with SERE")))


# In a process of its own


def become(capability: tuple[int, int]) -> None:
    """Let vLLM think that this machine has a GPU, and all of FlashInfer."""
    # Operators, which need a driver to be loaded.
    for name in ("vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch", "vllm.vllm_flash_attn"):
        sys.modules[name] = MagicMock(__spec__=None)
    import vllm.platforms
    import vllm.utils.flashinfer as flashinfer
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Simulated(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "simulated"

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 132

    vllm.platforms._current_platform = Simulated()
    import vllm._custom_ops as operators

    for name in dir(operators):
        if "_supports_" in name or name.endswith("_supported"):  # asks the operators for what they were built for
            setattr(operators, name, lambda *_, **__: True)
    for name in dir(flashinfer):
        if name.startswith("has_"):
            setattr(flashinfer, name, lambda *_, **__: True)


def selections() -> dict[str, Any]:
    """By format: a call that takes vLLM's configuration of a layer and gives (backend, class of experts)."""
    from vllm.model_executor.layers.fused_moe.oracle import fp8, int_wna16, mxfp4, nvfp4, unquantized
    from vllm.model_executor.layers.quantization.utils import quant_utils as keys

    def wna16(config: Any, kind: type, zero_points: bool) -> Any:
        quant = kind.__new__(kind)
        vars(quant).update(group_size=128, desc_act=False, weight_bits=4)
        key = keys.kInt4StaticAsym if zero_points else keys.kInt4Static
        return int_wna16.select_wna16_moe_backend(config, key, quant, zero_points, False)

    from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig

    static, dynamic = keys.kFp8StaticTensorSym, keys.kFp8DynamicTensorSym
    blocks = (keys.kFp8Static128BlockSym, keys.kFp8Dynamic128Sym)
    return {
        "bfloat16": unquantized.select_unquantized_moe_backend,
        "FP8 per tensor, online": lambda config: fp8.select_fp8_moe_backend(config, static, dynamic),
        "FP8 per tensor, static": lambda config: fp8.select_fp8_moe_backend(config, static, static),
        "FP8 in blocks of 128 x 128": lambda config: fp8.select_fp8_moe_backend(config, *blocks),
        "int4, GPTQ or compressed-tensors": lambda config: wna16(config, AutoGPTQConfig, False),
        "int4, AWQ": lambda config: wna16(config, AutoAWQConfig, True),
        "NVFP4": lambda config: nvfp4.select_nvfp4_moe_backend(config, keys.kNvfp4Static, keys.kNvfp4Dynamic),
        "MXFP4 of gpt-oss": mxfp4.select_mxfp4_moe_backend,
    }


def layer(gpt_oss: bool, sere: bool) -> Any:
    """What vLLM's selection is told of a layer: the shape of Qwen3-30B-A3B, or of gpt-oss-20b."""
    import torch
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType

    experts, top_k, hidden, inner = (32, 4, 2880, 2880) if gpt_oss else (128, 8, 2048, 768)
    return FusedMoEConfig(
        num_experts=experts, experts_per_token=top_k, hidden_dim=hidden, intermediate_size=inner,
        num_local_experts=experts, num_logical_experts=experts, device="cpu", in_dtype=torch.bfloat16,
        activation=MoEActivation.SWIGLUOAI if gpt_oss else MoEActivation.SILU, has_bias=gpt_oss,
        routing_method=RoutingMethodType.Renormalize, moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        require_decomposed_backend=sere,
    )  # fmt: skip


def chosen(capability: tuple[int, int]) -> dict[str, list[list[Any]]]:
    """By format, without SERE and with it: backend, class, and whether it routes by itself; or what vLLM says."""
    become(capability)
    from vllm.config import VllmConfig, set_current_vllm_config

    found: dict[str, list[list[Any]]] = {}
    config = VllmConfig()
    config.model_config = SimpleNamespace(hf_text_config=SimpleNamespace(model_type=""), quantization_config=None)
    with set_current_vllm_config(config):
        for name, select in selections().items():
            for sere in (False, True):
                try:
                    backend, experts = select(layer(name.startswith("MXFP4"), sere))
                    cell = [backend.value, experts.__name__, bool(experts.is_monolithic())]
                except (NotImplementedError, ValueError) as error:
                    cell = ["", str(error), False]
                found.setdefault(name, []).append(cell)
    return found


# Outside


def rows(by_device: dict[str, dict[str, list[list[Any]]]]) -> list[tuple[str, ...]]:
    """Of the table: "name (routes by itself)" where a kernel does."""
    formats = next(iter(by_device.values()))
    return [
        (name, *(_cell(cell) for device in by_device.values() for cell in device[name]))
        for name in formats
    ]  # fmt: skip


def _cell(cell: list[Any]) -> str:
    backend, kernel, alone = cell
    return f"none: {kernel}" if not backend else f"{kernel}, routes by itself" if alone else kernel


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def write(table: list[tuple[str, ...]], file: Path = FILE) -> None:
    """Replace the table in the page."""
    lines = file.read_text(encoding="utf-8").splitlines()
    start = lines.index(_line(HEADS)) + 2
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    lines[start:end] = [_line(row) for row in table]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


@click.command(help=__doc__)
@click.option("--one", hidden=True, default="")
def main(one: str) -> None:
    """All devices, and the page."""
    if one:
        click.echo("RESULT" + json.dumps(chosen(DEVICES[one])))
        return
    found = {}
    for device in DEVICES:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.vllm_formats", "--one", device],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise click.ClickException(done.stderr[-3000:])
        found[device] = json.loads(done.stdout.rpartition("RESULT")[2])
    table = rows(found)
    for row in table:
        click.echo(_line(row))
    write(table)


if __name__ == "__main__":
    main()
