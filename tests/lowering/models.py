"""What the tests of the lowerings share: a small MoE layer, ids as outputs of a program, the oracle's ids."""

from __future__ import annotations

import contextlib

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, OutputKind, OutputSpec, TensorArgument

from sere_compile import SimilarityProfile
from sere_compile.lowering.standard_operators import sere_nodes
from sere_compile.testing import oracle_routing

EXPERTS, TOP_K, WIDTH = 12, 4, 8


class SmallMoE(nn.Module):
    """Routing as in transformers and experts by indexing; `leaks` returns the ids too, so that they leave the graph."""

    def __init__(self, leaks: bool = False) -> None:
        super().__init__()
        self.leaks = leaks
        generator = torch.Generator().manual_seed(0)
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.gate.weight.data.normal_(generator=generator)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator))

    def forward(self, hidden):  # [T, WIDTH]
        weights, ids = self.gate(hidden).softmax(-1).topk(TOP_K, dim=-1)
        each = torch.einsum("th,tkhw->tkw", hidden, self.experts[ids])
        out = (each * weights[..., None]).sum(1)
        return (out, ids, weights) if self.leaks else out


def small_profile(seed: int = 0) -> SimilarityProfile:
    half = torch.rand(EXPERTS, EXPERTS, generator=torch.Generator().manual_seed(seed))
    return SimilarityProfile({"gate.weight": (half + half.T) / 2})


def hidden_states(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def with_ids_as_outputs(program: ExportedProgram) -> ExportedProgram:
    """The program with the re-routed ids of every gate behind its other outputs."""
    ids = sere_nodes(program)
    assert ids
    output = program.graph.output_node()
    output.args = ((*output.args[0], *ids),)
    program.graph_module.recompile()
    old = program.graph_signature
    specs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in ids]
    program._graph_signature = ExportGraphSignature(old.input_specs, [*old.output_specs, *specs])
    call = program.module_call_graph[0].signature
    leaves = call.out_spec.num_leaves
    call.out_spec = pytree.tree_structure((call.out_spec.unflatten(range(leaves)), [0] * len(ids)))
    return program


@contextlib.contextmanager
def oracle_ids(model, matrices, *numbers, **options):
    """`oracle_routing` that collects the ids [T, K] every experts module is called with, in order."""
    seen: list[torch.Tensor] = []
    with oracle_routing(model, matrices, *numbers, **options), contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if name.endswith(".experts"):
                handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[1].clone()))
                stack.callback(handle.remove)
        yield seen
