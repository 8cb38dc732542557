"""`Program`: a graph that was traced ahead of time, while it is rewritten; whole models: tests/test_rewrite.py."""

import types

import pytest
import torch
from torch import nn

from sere_compile.compiler.program import Program
from sere_compile.errors import ConfigError
from sere_compile.passes.graph import nodes

from ..passes.graph.written import Written
from ..passes.moe_modules import from_make_fx


class Scaled(nn.Module):
    """A parameter, a buffer and a constant."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x):
        return self.layer(x) * self.shift + torch.tensor([1.0, 2.0, 3.0, 4.0])


class Again(Scaled):
    """Another class, whose live modules own its weights."""


def exported(dynamic=False, module=None):
    sizes = {"x": {0: torch.export.Dim("tokens", min=2, max=64)}} if dynamic else None
    return torch.export.export(module or Scaled(), (torch.ones(5, 3),), dynamic_shapes=sizes)


def of_weight(node):
    return types.SimpleNamespace(router_weight=node)


class TestWhatInputsHold:
    def test_of_an_exported_program(self):
        source = exported()
        program = Program(source)
        held = {node.name: program.value_of(node) for node in program.module.graph.find_nodes(op="placeholder")}
        assert held.pop("x") is None
        named = {program.weight_name(of_weight(n)): n.name for n in program.module.graph.find_nodes(op="placeholder")}
        assert set(named) >= {"layer.weight", "layer.bias", "shift", "x"}
        for name in ("layer.weight", "layer.bias", "shift"):
            assert held[named[name]] is source.state_dict[name]
        [constant] = [value for name, value in held.items() if name.startswith("c_")]
        assert constant.tolist() == [1, 2, 3, 4]

    def test_of_a_graph(self):
        module = Again()
        program = Program(from_make_fx(module, torch.ones(5, 3)))
        weights = [n for n in program.module.graph.find_nodes(op="get_attr") if nodes.shape(n) == (4, 3)]
        assert program.value_of(weights[0]) is module.layer.weight
        assert program.weight_name(of_weight(weights[0])) == "layer.weight"
        assert program.value_of(next(iter(program.module.graph.nodes))) is None

    def test_names_that_a_tracer_kept(self):
        """No live module is asked for them."""
        program = Program(torch.fx.symbolic_trace(Scaled()))
        program.owners = None
        w = Written()
        assert program.weight_name(of_weight(w.graph.get_attr("layers.0.gate"))) == "layers.0.gate"

    def test_names_of_tensors_that_nobody_owns(self):
        w = Written()
        w.graph.output(w.graph.get_attr("_param_constant0"))
        root = nn.Module()
        root._param_constant0 = nn.Parameter(torch.ones(2))
        program = Program(torch.fx.GraphModule(root, w.graph))
        program.owners = types.SimpleNamespace(find=lambda weight: None)
        [node] = program.module.graph.find_nodes(op="get_attr")
        assert program.weight_name(of_weight(node)) == "_param_constant0"

    def test_shapes(self):
        assert Program(exported()).has_shapes()
        assert not Program(torch.fx.symbolic_trace(Scaled())).has_shapes()

    @pytest.mark.parametrize("fuses", [False, True])
    def test_what_a_program_takes(self, fuses):
        program = Program(exported(), fuses_experts=fuses)
        assert (program.fuses_experts, program.takes_kernels, program.has_gradients) == (fuses, False, False)


class TestLimits:
    @staticmethod
    def exceeds(limit, dynamic=True):
        program = Program(exported(dynamic))
        [product] = [n for n in program.module.graph.nodes if nodes.kind(n) == "linear"]
        return program.has_more_tokens(types.SimpleNamespace(ids=product), limit)

    def test_one_side_of_all_batches(self):
        assert self.exceeds(1) is True
        assert self.exceeds(64) is False
        assert self.exceeds(4, dynamic=False) is True
        assert self.exceeds(5, dynamic=False) is False

    def test_both_sides(self):
        with pytest.raises(ConfigError, match="max_tokens=8 lies inside the range of batch sizes"):
            self.exceeds(8)


class TestPlaces:
    @pytest.mark.parametrize("trace", [exported, lambda: from_make_fx(Scaled(), torch.ones(5, 3))])
    def test_matrices_become_buffers(self, trace):
        """One for each gate and kind, ahead of what reads them, under a number of its own."""
        program, first, second = Program(trace()), object(), object()
        value = torch.arange(4.0)
        node = program.place(first, "similarity", value)
        assert program.place(first, "similarity", torch.ones(4)) is node
        others = [program.place(second, "similarity", value), program.place(first, "projection", value)]
        names = [str(n.target).removeprefix("b_") for n in (node, *others)]
        assert names == ["sere_similarity_0", "sere_similarity_1", "sere_projection_0"]
        [added] = [n for n in program.module.graph.nodes if nodes.kind(n) == "add"]
        added.update_arg(1, others[0])
        program.drop_unused(first)
        program.drop_unused(first)
        program.drop_unused(second)
        done = program.finish()
        run = done.module() if hasattr(done, "graph_signature") else done
        x = torch.zeros(5, 3)
        held = dict(run.named_buffers())
        assert [name for name in held if "sere_" in name] == ["sere_similarity_1"]
        bias = next(p for p in run.parameters() if p.shape == (4,)) if list(run.parameters()) else None
        assert bias is None or torch.allclose(run(x), bias + value)

    def test_the_signature_says_so(self):
        program = Program(exported())
        plan = object()
        node = program.place(plan, "similarity", torch.arange(4.0))
        assert isinstance(node.meta["val"], torch._subclasses.FakeTensor)
        assert node.meta["val"].shape == (4,)
        [product] = [n for n in program.module.graph.nodes if nodes.kind(n) == "add"]
        product.update_arg(1, node)
        done = program.finish()
        assert done.graph_signature.inputs_to_buffers["b_sere_similarity_0"] == "sere_similarity_0"
        assert done.state_dict["sere_similarity_0"].tolist() == [0, 1, 2, 3]
        order = [n.name for n in done.graph.find_nodes(op="placeholder")]
        assert order[-2:] == ["b_sere_similarity_0", "x"]
        assert [spec.arg.name for spec in done.graph_signature.input_specs] == order
        assert done.graph_signature.user_inputs == ("x",)
        [out] = done.graph_signature.output_specs
        assert out.arg.name == product.name

    def test_a_program_that_takes_nothing(self):
        """The matrix stands behind its last parameter."""

        class Constant(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(4))

            def forward(self):
                return self.weight + 1

        program = Program(torch.export.export(Constant(), ()))
        node = program.place(object(), "similarity", torch.ones(4))
        assert list(program.module.graph.find_nodes(op="placeholder"))[-1] is node

    def test_the_traced_program_stays(self):
        source = exported()
        before = str(source.graph)
        Program(source).place(object(), "similarity", torch.ones(4))
        assert str(source.graph) == before
