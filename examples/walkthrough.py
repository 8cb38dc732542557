"""What the examples do with a model, step by step. Not an example itself: run mixtral.py or qwen_moe.py."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule
from transformers import CompileConfig, PreTrainedModel

import sere_compile
from sere_compile.commands.demo import PROMPTS
from sere_compile.integrations.transformers import is_shipped, load_causal_lm
from sere_compile.testing import oracle_routing


@dataclass
class Walk:
    """A model with its tokenized prompts and the options in force."""

    model: PreTrainedModel
    tokenizer: Any
    inputs: dict[str, torch.Tensor]
    config: sere_compile.SereConfig
    new_tokens: int

    def generate(self, compile_config: CompileConfig | None) -> torch.Tensor:
        """Greedy continuations [batch, new_tokens], with the decode step compiled so or, for None, eager."""
        output = self.model.generate(
            **self.inputs,
            max_new_tokens=self.new_tokens,
            do_sample=False,
            cache_implementation="static",
            compile_config=compile_config,
            disable_compile=compile_config is None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return output[:, self.inputs["input_ids"].shape[1] :]


def main(default: str, description: str) -> None:
    """Run the whole example on a checkpoint, by default one of the package's models; exit 1 on a difference."""
    arguments = _parse(default, description)
    walk = _prepare(arguments)

    name = arguments.model
    origin = ", a small trained model that comes with the package" if is_shipped(name) else ""
    print(f"Model: {name}{origin}, in {str(walk.model.dtype).removeprefix('torch.')} on {walk.model.device.type}")
    _title("Gates found")
    report = sere_compile.explain(walk.model, **walk.inputs, use_cache=False, config=walk.config)
    print(report)
    if not report.rewritten:
        sys.exit("no gate was rewritten")

    _title(f"Greedy continuations of a decode batch of {len(PROMPTS)}")
    sere = sere_compile.generate_config(**dataclasses.asdict(walk.config))
    original, rerouted = walk.generate(None), walk.generate(sere)
    for prompt, before, after in zip(PROMPTS, *(_texts(walk, ids) for ids in (original, rerouted)), strict=True):
        print(f"{prompt!r}\n    without SERE  {before!r}\n    with SERE     {after!r}")

    _title("Active experts per decode step")
    for name, counted in sere_compile.stats(walk.model).items():
        before, after = counted.mean_active_before, counted.mean_active_after
        changed = counted.slots_changed / counted.slots
        print(f"{name}: {before:.1f} -> {after:.1f}, {changed:.0%} of the slots re-routed")

    print(
        "Decoding gets faster where reading experts is what takes the time: in large models, on a GPU (README). This "
        "one shows what is re-routed, not how fast."
    )

    graph = _capture(walk)
    _title("The first gate after rewriting")
    print(_gate_code(graph))

    _title("Check against an eager oracle")
    _check(walk, report)


def _parse(default: str, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", metavar="NAME_OR_PATH", default=default, help="a checkpoint (default: %(default)s, of the package)"
    )
    parser.add_argument("--select-top-k", type=int, metavar="S", help="default: min(2, K - 1)")
    parser.add_argument("--threshold", type=float, default=0.0, metavar="RHO")
    parser.add_argument("--profile", metavar="FILE", help="similarity profile (default: the experts are probed)")
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument(
        "--inner",
        metavar="BACKEND",
        help="what compiles the rewritten graph (default: inductor on a GPU, eager on a CPU, where it saves a minute)",
    )
    return parser.parse_args()


def _prepare(arguments: argparse.Namespace) -> Walk:
    # The package keeps its models in bfloat16; small ones are compared in float32.
    dtype = torch.float32 if is_shipped(arguments.model) else "auto"
    model, tokenizer = load_causal_lm(arguments.model, dtype=dtype)
    if arguments.profile:
        sere_compile.attach(model, sere_compile.SimilarityProfile.load(arguments.profile))
    inputs = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    inputs = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
    config = sere_compile.SereConfig(
        select_top_k=arguments.select_top_k,
        threshold=arguments.threshold,
        collect_stats=True,
        inner=arguments.inner or ("inductor" if torch.cuda.is_available() else "eager"),
    )
    return Walk(model, tokenizer, inputs, config, arguments.new_tokens)


def _texts(walk: Walk, ids: torch.Tensor) -> list[str]:
    return walk.tokenizer.batch_decode(ids, skip_special_tokens=True)


def _capture(walk: Walk) -> GraphModule:
    """The rewritten graph of one forward over the prompts."""
    graphs: list[GraphModule] = []

    def inner(graph: GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(walk.model, backend=sere_compile.SereBackend(walk.config.replace(inner=inner)))
    with torch.no_grad():
        compiled(**walk.inputs, use_cache=False)
    return next(graph for graph in graphs if "sere" in graph.code)


def _gate_code(graph: GraphModule) -> str:
    """The lines of FX code from the router's projection to the dispatch."""
    lines = [re.sub(r";  .*", "", line).strip() for line in graph.code.splitlines()]
    lines = [line for line in lines if line]
    operator = next(i for i, line in enumerate(lines) if "torch.ops.sere" in line)
    projection = max(i for i in range(operator) if "linear(" in lines[i])
    return "\n".join(line.replace("l_self_modules_", "") for line in lines[projection : operator + 4])


def _check(walk: Walk, report: sere_compile.GateReport) -> None:
    """Compare one decode-sized forward, compiled, with an eager model whose routers return re-routed ids."""
    model, config = walk.model, walk.config
    matrices = {
        name: sere_compile.similarity.binding.lookup(model.get_parameter(name)).matrix.cpu()
        for name in (row.name for row in report.rewritten)
    }
    select_top_k = report.rewritten[0].select_top_k
    with torch.no_grad():
        # One token a prompt: over a whole prompt almost every expert is primary and little is re-routed.
        ids = walk.inputs["input_ids"][:, -1:]
        compiled = torch.compile(model, backend=sere_compile.SereBackend(config.replace(inner="eager")))
        got = compiled(ids, use_cache=False).logits
        with oracle_routing(model, matrices, select_top_k, config.threshold):
            expected = model(ids, use_cache=False).logits
        unchanged = model(ids, use_cache=False).logits
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    difference = (got - expected).abs().max().item()
    print(
        f"largest logit difference to the oracle {difference:.1e} (rounding), to the model without SERE "
        f"{(got - unchanged).abs().max().item():.1e} (what re-routing changes)"
    )
    if not torch.allclose(got, expected, rtol=tolerance, atol=tolerance):
        sys.exit("the compiled model differs from the oracle")
    if select_top_k < report.rewritten[0].top_k and torch.equal(got, unchanged):
        sys.exit("re-routing changed nothing: this batch cannot show that it works")
    print("equal")


def _title(text: str) -> None:
    print(f"\n== {text}")
