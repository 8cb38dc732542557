"""What an MoE layer costs in onnxruntime on a CPU, by how its experts are exported and by S.

    python -m benchmarks.onnx_experts --hidden 512 --inner 256 --tokens 8,32

One Qwen3-MoE layer with E = 64 and K = 8 and random weights, free sizes, one decoding batch of T tokens a call,
min_active = 0; the quantised forms have weights of 8 and 4 bits. Every variant is a file of its own, all are loaded in
one process, and runs go in turn; medians in milliseconds for S = K (the model itself) and fewer. Active experts are
those that the ids of a call name, on average.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from sere_compile import SereConfig, SimilarityProfile
from sere_compile.lowering import onnx
from sere_compile.lowering.export import export_rewritten, holds_our_operators
from sere_compile.lowering.standard_operators import QUANTISED
from tests.lowering.models import with_ids_as_outputs

EXPERTS, TOP_K = 64, 8
FORMS = ("batched_mm", "conditional", "onnxruntime_moe", *QUANTISED)


class Layer(nn.Module):
    """The model's own block, as a function of [T, hidden]."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            hidden_size=hidden, moe_intermediate_size=inner, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
            norm_topk_prob=True,
        )  # fmt: skip
        config._experts_implementation = "batched_mm"
        self.mlp = Qwen3MoeSparseMoeBlock(config)
        for parameter in self.mlp.parameters():
            nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """float32 [T, hidden]."""
        out = self.mlp(hidden[None])
        return (out[0] if isinstance(out, tuple) else out)[0]


def session(layer: Layer, form: str, select_top_k: int, width: int, folder: Path, threads: int) -> Any:
    """The layer, exported and loaded; its second output is the ids, where they are re-routed."""
    half = torch.rand(EXPERTS, EXPERTS, generator=torch.Generator().manual_seed(0))
    config = SereConfig(select_top_k=select_top_k, min_active=0)
    program = export_rewritten(
        layer.eval(),
        (torch.randn(6, width),),
        profile=SimilarityProfile({"mlp.gate.weight": (half + half.T) / 2}),
        config=config,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        experts=form,
    )
    if select_top_k < TOP_K:
        program = with_ids_as_outputs(program)
    path = folder / f"{form}{select_top_k}.onnx"
    config = None if holds_our_operators(program) else config
    onnx.export(program, None, path, config=config, input_names=["hidden"], allow_no_gates=True, experts=form)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def row(
    sessions: dict[tuple[str, int], Any], select_top_k: int, tokens: int, width: int, repeats: int,
    errors: dict[str, float],
) -> str:  # fmt: skip
    """Medians of the forms, in turn, and how many experts the ids name; the largest errors go into `errors`."""
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    active = []
    for seed in range(repeats + 1):
        hidden = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
        results = []
        for form in FORMS:
            begin = time.perf_counter()
            results.append(sessions[form, select_top_k].run(None, {"hidden": hidden.numpy()}))
            times[form].append(time.perf_counter() - begin)
        first, *others = ([torch.from_numpy(value) for value in result] for result in results)
        for form, other in zip(FORMS[1:], others, strict=True):
            error = ((first[0] - other[0]).norm() / first[0].norm()).item()
            errors[form] = max(errors.get(form, 0.0), error)
            assert form in QUANTISED or error <= 1e-4
            assert all(map(torch.equal, first[1:], other[1:]))
        active += [len(ids.unique()) for ids in first[1:]]
    told = "all" if not active else f"{statistics.mean(active):.1f}"
    # The first run of each is left out.
    cells = [f"{statistics.median(times[form][1:]) * 1e3:.1f}" for form in FORMS]
    return f"| {tokens} | {select_top_k} | {told} | {' | '.join(cells)} |"


def main() -> None:
    """Print a line for every number of tokens and every S."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--inner", type=int, default=256)
    parser.add_argument("--tokens", default="1,8,32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    layer, width = Layer(arguments.hidden, arguments.inner), arguments.hidden
    with tempfile.TemporaryDirectory() as folder:
        sessions = {
            (form, s): session(layer, form, s, width, Path(folder), arguments.threads)
            for form in FORMS
            for s in (TOP_K, 2, 1)
        }
    errors: dict[str, float] = {}
    print(f"| Tokens | S | Active experts | {' | '.join(FORMS)} |\n{'| --- ' * (3 + len(FORMS))}|")
    for tokens in map(int, arguments.tokens.split(",")):
        for s in (TOP_K, 2, 1):
            print(row(sessions, s, tokens, width, arguments.repeats, errors), flush=True)
    print(
        "Largest error of a batch, of its norm: " + ", ".join(f"{form} {error:.1e}" for form, error in errors.items())
    )


if __name__ == "__main__":
    main()
