"""What each of two ranks runs, started by torchrun; the tests read what it writes.

    python -m torch.distributed.run --standalone --nproc_per_node 2 -m tests.parallel.program MODEL OUT

Both ranks go through the same cases in the same order. A case that raises is written down as that, on every rank.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import sere_compile
from sere_compile import SimilarityProfile
from sere_compile.integrations import experts as registry
from sere_compile.testing import oracle_routing

from ..compiled import logits
from ..tiny_models import random_profile, tokens

TOP_K = 4
RAGGED = (6, 3)
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": {"tp_size": 2},
    "tp+ep": {"tp_size": 2, "ep_size": 2},
    "tp+ep, all_reduce": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
    "tp+ep, all_to_all": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    "ep": {"fsdp_size": 2, "ep_size": 2},
    "fsdp": {"fsdp_size": 2},
}


class Ranks:
    """One rank's view. Attributes: rank; model: a folder; plain: the model in one process; found: what is written."""

    def __init__(self, model: Path) -> None:
        dist.init_process_group("gloo")
        self.rank, self.model = dist.get_rank(), model
        self.mesh = init_device_mesh("cpu", (2,))
        self.plain = self.load()
        self.profile = random_profile(self.plain)
        self.found: dict[str, Any] = {}
        self.ids: list[torch.Tensor] = []
        # Before a model is loaded: what brings tokens to other ranks' experts is chosen then.
        register(self.ids, 1)
        logging.getLogger("sere_compile").addHandler(self.Said(self))

    class Said(logging.Handler):
        """Keeps what the library warns of."""

        def __init__(self, ranks: Ranks) -> None:
            super().__init__(logging.WARNING)
            self.ranks, self.lines = ranks, []
            ranks.said = self.lines

        def emit(self, record: logging.LogRecord) -> None:
            self.lines.append(record.getMessage())

    said: list[str]

    def load(self, experts: str = "grouped_mm", **layout: Any) -> nn.Module:
        """The model, in a layout."""
        options = {"distributed_config": DistributedConfig(**layout)} if layout else {}
        model = AutoModelForCausalLM.from_pretrained(
            self.model, dtype=torch.float32, experts_implementation=experts, **options
        )
        return model.eval()

    def case(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Run one case, and wait for the other rank."""
        self.said.clear()
        self.ids.clear()
        try:
            result = run()
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
            result = {"raised": f"{type(error).__name__}: {error}"}
        digest = hashlib.sha256(b"".join(ids.long().numpy().tobytes() for ids in self.ids)).hexdigest()
        self.found[name] = {**result, "ids": digest if self.ids else None, "said": list(self.said)}
        print(self.rank, name, {k: v for k, v in self.found[name].items() if k != "said"}, flush=True)
        dist.barrier()

    def expected(self, ids: torch.Tensor, select: int = 1) -> torch.Tensor:
        """Of one process and an oracle."""
        with oracle_routing(self.plain, self.profile, select, min_active=0):
            return logits(self.plain, ids)

    def compiled(self, model: nn.Module, **options: Any) -> Callable[..., Any]:
        """Compiled with our backend and an inner compiler that keeps what re-routing gives."""
        torch._dynamo.reset()
        settings = {"select_top_k": 1, "min_active": 0, "inner": self._recording, **options}
        return torch.compile(model, backend="sere", options=settings)

    def _recording(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        recorder = Recorder(graph, self.ids)
        return lambda *args: recorder.run(*args)

    def compare(self, layout: dict[str, Any], ids: torch.Tensor, eager: bool) -> dict[str, Any]:
        """The model in a layout of transformers, see `against_one`."""
        model = self.load(**layout)
        stock = logits(model, ids)
        return self.against_one(self.load("sere", **layout) if eager else model, stock, ids, eager)

    def against_one(self, model: nn.Module, stock: torch.Tensor, ids: torch.Tensor, eager: bool) -> dict[str, Any]:
        """S = K against the same layout without us, and S = 1 against one process, each by its largest difference."""
        sere_compile.attach(model, self.profile)
        found: dict[str, Any] = {}
        for name, select in (("identity", TOP_K), ("rerouted", 1)):
            self.ids.clear()
            if eager:
                register(self.ids, select)
            step = model if eager else self.compiled(model, select_top_k=select)
            got = logits(step, ids)
            if select == TOP_K:
                found[name] = bool(torch.equal(got, stock))
            else:
                found[name] = (got - self.expected(ids)).abs().max().item()
                found["changes"] = (got - stock).abs().max().item()
        return found


class Recorder(torch.fx.Interpreter):
    """Runs a graph, and keeps the ids that re-routing gives."""

    def __init__(self, graph: torch.fx.GraphModule, ids: list[torch.Tensor]) -> None:
        super().__init__(graph)
        self.kept = ids

    def run_node(self, node: torch.fx.Node) -> Any:
        value = super().run_node(node)
        if node.target is torch.ops.sere.reroute.default or "sere.reroute" in str(node.target):
            self.kept.append(value.clone() if isinstance(value, torch.Tensor) else value[0].clone())
        return value


def register(ids: list[torch.Tensor], select: int) -> None:
    """`register_experts`, and keep what it gives."""
    sere_compile.register_experts(select_top_k=select, min_active=0)
    stock = registry._Rerouted._reroute

    def reroute(self: Any, *args: Any) -> Any:
        new, weights = stock(self, *args)
        ids.append(new.clone())
        return new, weights

    if not getattr(stock, "_records", False):
        reroute._records = True  # type: ignore[attr-defined]
        registry._Rerouted._reroute = reroute  # type: ignore[method-assign]


class Block(nn.Module):
    """Router, experts in slices and nothing else; torch's own tensor parallelism divides the router."""

    def __init__(self, experts: int = 8, hidden: int = 16, inner: int = 12) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, hidden, inner, generator=generator))
        self.down = nn.Parameter(torch.randn(experts, inner, hidden, generator=generator))
        self.out = nn.Linear(hidden, hidden, bias=False)
        with torch.no_grad():
            for weight in (self.gate.weight, self.out.weight):
                weight.copy_(torch.randn(weight.shape, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2, dim=-1)
        inner = torch.relu(torch.einsum("th,tkhi->tki", x, self.up[ids]))
        return self.out((torch.einsum("tki,tkih->tkh", inner, self.down[ids]) * weights[..., None]).sum(1))


def block_profile() -> SimilarityProfile:
    half = torch.rand(8, 8, generator=torch.Generator().manual_seed(2))
    return SimilarityProfile({"gate.weight": ((half + half.T) / 2).fill_diagonal_(1.0)}, {"method": "random"})


def run_block(ranks: Ranks, divide: Callable[[Block], Any]) -> dict[str, Any]:
    """A block as `divide` leaves it, against the same in one process."""
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(5))
    plain = Block()
    sere_compile.attach(plain, block_profile())
    with torch.no_grad():
        expected = ranks.compiled(plain)(x)
        divided = Block()
        divide(divided)
        stock = divided(x)
        sere_compile.attach(divided, block_profile())
        same = ranks.compiled(divided, select_top_k=2)(x)
        ranks.ids.clear()
        got = ranks.compiled(divided)(x)
    return {
        "identity": bool(torch.equal(same, stock)),
        "rerouted": (got - expected).abs().max().item(),
        "changes": (got - stock).abs().max().item(),
        "weight": type(divided.gate.weight.data).__name__,
    }


def run_all(ranks: Ranks) -> None:
    """Every case."""
    batch, own = tokens(6, 1), tokens(RAGGED[ranks.rank], 1, seed=ranks.rank)
    for name, layout in LAYOUTS.items():
        mine = own if layout.get("fsdp_size") else batch
        for how in ("compiled", "eager"):
            ranks.case(f"{name}, {how}", lambda: ranks.compare(layout, mine, how == "eager"))  # noqa: B023
    # All of one token's slots go to one expert: the other rank's have no tokens.
    for name, how in (("tp+ep", "compiled"), ("tp+ep, all_to_all", "eager"), ("tp+ep", "eager")):
        ranks.case(
            f"{name}, {how}, one token",
            lambda: ranks.compare(LAYOUTS[name], tokens(1, 1), how == "eager"),  # noqa: B023
        )
    for name in ("tp", "tp+ep"):
        ranks.case(f"{name}, compiled, no profile", lambda: without_profile(ranks, LAYOUTS[name], batch, False))  # noqa: B023
        ranks.case(f"{name}, eager, no profile", lambda: without_profile(ranks, LAYOUTS[name], batch, True))  # noqa: B023
    ranks.case("fully_shard", lambda: ranks.against_one(sharded(ranks), logits(sharded(ranks), own), own, False))
    ranks.case("block, fully_shard", lambda: run_block(ranks, lambda block: fully_shard(block, mesh=ranks.mesh)))
    column, row = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())
    ranks.case("block, router", lambda: run_block(ranks, lambda b: parallelize_module(b, ranks.mesh, {"gate": column})))
    ranks.case("block, output", lambda: run_block(ranks, lambda b: parallelize_module(b, ranks.mesh, {"out": row})))


def sharded(ranks: Ranks) -> nn.Module:
    """The model under torch's `fully_shard`, layer by layer."""
    model = ranks.load()
    for layer in model.model.layers:
        fully_shard(layer, mesh=ranks.mesh)
    return fully_shard(model, mesh=ranks.mesh)


def without_profile(ranks: Ranks, layout: dict[str, Any], ids: torch.Tensor, eager: bool) -> dict[str, Any]:
    """Nothing attached: how far it is from the same layout without us."""
    stock = logits(ranks.load(**layout), ids)
    register(ranks.ids, 1)
    model = ranks.load("sere" if eager else "grouped_mm", **layout)
    return {"changes": (logits(model if eager else ranks.compiled(model), ids) - stock).abs().max().item()}


def main() -> None:
    """Run on this rank."""
    torch.set_num_threads(1)
    ranks = Ranks(Path(sys.argv[1]))
    run_all(ranks)
    Path(sys.argv[2], f"{ranks.rank}.json").write_text(json.dumps(ranks.found, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
