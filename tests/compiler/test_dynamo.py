"""`dynamo`: what is read of Dynamo's own bookkeeping, and changed in it, asked of Dynamo itself."""

import contextlib
import copy
import math
import os
import subprocess
import sys
import threading
import time
import types
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo import config
from torch._dynamo.source import AttrSource, ConstantSource, LocalSource
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.utils import counters

from sere_compile.compiler import dynamo

from ..passes.graph.written import Written

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(function, seen, **options):
    """The function, compiled so that `seen(graph, inputs)` is asked for every graph, which runs as it is."""

    def backend(graph, inputs):
        return seen(graph, inputs) or graph.forward

    return torch.compile(function, backend=backend, **options)


class TestGraphs:
    def test_a_copy_keeps_what_dynamo_wrote(self):
        graphs = []
        compiled(lambda x: x + 1, lambda graph, inputs: graphs.append(graph))(torch.ones(2))
        [graph] = graphs
        graph._backend_id = "a backend"
        copied = dynamo.copy_graph(graph)
        [old], [new] = (g.graph.find_nodes(op="placeholder") for g in (graph, copied))
        assert new is not old
        assert new._dynamo_source is old._dynamo_source
        assert copied._backend_id == "a backend"
        assert copied._param_name_to_source is graph._param_name_to_source
        del graph._backend_id
        assert not hasattr(dynamo.copy_graph(graph), "_backend_id")
        new.graph.erase_node(new.graph.output_node())
        graph.graph.lint()

    def test_a_graph_that_dynamo_did_not_write(self):
        plain = torch.fx.symbolic_trace(nn.Linear(2, 3))
        copied = dynamo.copy_graph(plain)
        assert [node.name for node in copied.graph.nodes] == [node.name for node in plain.graph.nodes]
        assert not hasattr(next(iter(copied.graph.nodes)), "_dynamo_source")

    def test_a_backend_that_is_copied_is_the_same(self):
        backend = dynamo.OwnBackend(lambda module, inputs: (module, inputs))
        assert copy.deepcopy(backend) is backend
        assert backend("graph", [1]) == ("graph", [1])
        assert backend.__name__ == "sere"

    def test_an_input_behind_the_others(self):
        """Of a static size, with what AOTAutograd asks an input for."""
        found = []

        def seen(graph, inputs):
            copied = dynamo.copy_graph(graph)
            node, fake = dynamo.append_input(copied, "matrix", torch.rand(3, 3), list(inputs))
            found.extend((copied, node, fake))

        compiled(lambda x: x + 1, seen, dynamic=True)(torch.ones(5))
        copied, node, fake = found
        assert list(copied.graph.find_nodes(op="placeholder"))[-1] is node
        assert node.target == "matrix"
        assert node.meta["example_value"] is fake
        assert isinstance(fake, torch._subclasses.FakeTensor)
        assert [type(size) for size in fake.shape] == [int, int]
        assert node.meta["tensor_dict"] == {"_dynamo_static_input_type": "unguarded"}
        assert isinstance(node._dynamo_source, ConstantSource)

    def test_an_input_of_a_graph_without_fake_tensors(self):
        w = Written()
        w.graph.output(w.given(2))
        value = torch.rand(3, 3)
        node, given = dynamo.append_input(torch.fx.GraphModule(nn.Module(), w.graph), "matrix", value, [])
        assert given is value
        assert node.meta["example_value"] is value

    def test_an_example_input_that_is_fake_tells_the_mode(self):
        w = Written()
        w.graph.output(w.given(2))
        mode = torch._subclasses.FakeTensorMode()
        example = mode.from_tensor(torch.ones(2))
        _, given = dynamo.append_input(
            torch.fx.GraphModule(nn.Module(), w.graph), "matrix", torch.rand(2, 2), [example]
        )
        assert given.fake_mode is mode


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['model']._modules['layers']._modules['0']._parameters['weight']", "model.layers.0.weight"),
        ("L['self'].gate._buffers['bias']", "gate.bias"),
        ("L['model'].router", "router"),
        ('G["net"].router', "router"),
        ("L['self'].layers[3].gate['w']", "layers.3.gate.w"),
        ("L['x']", "x"),
        ("L['weights']['router']", "router"),
        ("L['weights'][0]", "0"),
        ("L['self'].__dict__['_modules']['gate'].__dict__['_parameters']['weight']", "gate.weight"),
        ("___odd", "___odd"),
    ],
)
def test_names_of_inputs(source, name):
    """As the code reaches them, whether a source has its name as a text or makes it."""
    node = Written().given(2)
    assert dynamo.input_name(node) == node.target
    for named in (source, lambda: source):
        node._dynamo_source = types.SimpleNamespace(name=named)
        assert dynamo.input_name(node) == name


def test_names_that_dynamo_makes():
    node = Written().given(2)
    node._dynamo_source = AttrSource(LocalSource("self"), "router")
    assert dynamo.input_name(node) == "router"


class TestGuards:
    def test_a_graph_serves_calls_of_which_it_holds(self):
        graphs, asked = [], []

        def seen(graph, inputs):
            [node] = graph.graph.find_nodes(op="placeholder")
            wanted = float(now.sum())

            def holds(value):
                asked.append(value)
                return float(value.sum()) == wanted

            graphs.append(dynamo.guard_input(node, holds, "of a test"))

        add = compiled(lambda x: x + 1, seen)
        for now in (torch.ones(2), torch.ones(2), torch.zeros(2), torch.ones(2)):
            add(now)
        assert graphs == [True, True]
        assert any(value is now for value in asked)

    @pytest.mark.parametrize("at_the_root", [False, True])
    def test_a_weight_is_asked_about_at_every_call(self, at_the_root, monkeypatch):
        """Before 2.13 Dynamo takes a module's tensor for unchanged as long as the dict is: it is asked elsewhere."""
        if at_the_root:
            monkeypatch.setattr(dynamo, "_ASKS_OF_TENSORS", False)
        model, graphs, now = torch.nn.Sequential(torch.nn.Linear(4, 4)), [], [0]

        def seen(graph, inputs):
            [node] = [n for n in graph.graph.find_nodes(op="placeholder") if dynamo.input_name(n).endswith("weight")]
            wanted = now[0]
            graphs.append(dynamo.guard_input(node, lambda w: w is model[0].weight and now[0] == wanted, "of a test"))

        run, x = compiled(model, seen), torch.ones(2, 4)
        for now[0] in (1, 1, 1, 2, 1):
            run(x)
        assert graphs == [True, True]

    def test_what_is_gone_is_not_served(self):
        ask = dynamo._asked_at_the_root(LocalSource("x"), {"G": {}}, lambda value: value == 1)
        assert [ask({"x": 1}), ask({"x": 2}), ask({})] == [True, False, False]

    def test_a_question_keeps_no_argument_alive(self):
        given = torch.ones(2)
        kept = weakref.ref(given)
        ask = dynamo._asked_at_the_root(LocalSource("x"), {"G": {}, "L": {"x": given}}, lambda value: value == 1)
        del given
        assert kept() is None
        assert ask({"x": 1})

    def test_without_dynamo_there_is_none(self):
        node = Written().given(2)
        assert dynamo.guard_input(node, lambda value: True, "") is False
        node._dynamo_source = LocalSource("x")
        assert dynamo.guard_input(node, lambda value: True, "") is False

        def seen(graph, inputs):
            plain = Written().given(2)
            assert dynamo.guard_input(plain, lambda value: True, "") is False

        compiled(lambda x: x + 1, seen)(torch.ones(2))


class TestServeAtMost:
    @staticmethod
    def graphs(call, most, count, inputs, ranges=None):
        """How many graphs serve these inputs, each limited where it was made: the first to `most`."""
        made = []

        def seen(graph, given):
            made.append(graph)
            found = graph.graph.find_nodes(op="placeholder")
            limit = most if len(made) == 1 else 1000
            dynamo.serve_at_most(graph.graph, count([node.meta["example_value"] for node in found]), limit)

        served = compiled(call, seen)
        for given in inputs:
            for tensor in given:
                torch._dynamo.mark_dynamic(tensor, 0, **ranges or {})
            served(*given)
        return len(made)

    @staticmethod
    def product(values):
        return math.prod(math.prod(value.shape) for value in values if isinstance(value, torch.Tensor))

    @pytest.mark.parametrize("ranges", [{}, {"min": 2, "max": 1000}])
    def test_more_are_compiled_anew(self, ranges):
        """Also where the user has said that the size may be large: that is no error."""
        rows = [(torch.ones(n, 2),) for n in (3, 5, 4, 6, 3)]
        assert self.graphs(lambda x: x + 1, 2 * 5, self.product, rows, ranges) == 2

    def test_sizes_of_several_inputs(self):
        rows = [(torch.ones(n, 2), torch.ones(m, 2)) for n, m in ((3, 4), (5, 4), (4, 5), (6, 6))]
        assert self.graphs(lambda x, y: (x + 1, y + 1), 4 * 20, self.product, rows) == 2

    def test_numbers_that_are_none_of_a_call(self):
        """A constant, and what only the numbers of a call tell."""
        rows = [(torch.ones(n, 2),) for n in (3, 50)]
        assert self.graphs(lambda x: x + 1, 5, lambda values: 3, rows) == 1
        shape_env = torch.fx.experimental.symbolic_shapes.ShapeEnv()
        unbacked = shape_env.create_unbacked_symint()
        assert self.graphs(lambda x: x + 1, 5, lambda values: unbacked, rows) == 1

    def test_another_input_in_its_place_is_not_served(self):
        """A guard may not raise, whatever it is asked of."""
        asked = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dynamo, "guard_input", lambda node, holds, text: asked.append(holds))
            self.graphs(lambda x: x + 1, 10, self.product, [(torch.ones(3, 2),)])
        [holds] = asked
        assert [holds(value) for value in (torch.ones(5, 2), torch.ones(6, 2), None, torch.ones(()))] == [
            True, False, False, False,
        ]  # fmt: skip


class TestSettings:
    """What is changed is as it was afterwards, also after an error."""

    @pytest.mark.parametrize(
        ("context", "changed"),
        [
            (dynamo.dynamic_shape_capture, {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}),
            (dynamo.unlimited_recompiles, {"recompile_limit": 1 << 20, "accumulated_recompile_limit": 1 << 20}),
            (
                dynamo.compiling_aside,
                {"recompile_limit": 1 << 20, "automatic_dynamic_shapes": False, "assume_static_by_default": True},
            ),
        ],
    )
    def test_configuration(self, context, changed):
        with config.patch(automatic_dynamic_shapes=True, assume_static_by_default=False):
            before = {name: getattr(config, name) for name in changed}
            assert before != changed
            with contextlib.suppress(KeyError), context():
                assert {name: getattr(config, name) for name in changed} == changed
                raise KeyError
            assert {name: getattr(config, name) for name in changed} == before

    def test_graphs_before_loops(self):
        """A break in a loop leaves a graph of what is ahead of it there, and none elsewhere."""

        def looping(x):
            y = x * 2 + 1
            for number in range(3):
                if y.sum() > number:
                    y = y + 1
            return y

        def graphs(**options):
            torch._dynamo.reset()
            made = []
            compiled = torch.compile(looping, backend=lambda graph, _: made.append(graph) or graph.forward, **options)
            assert torch.equal(compiled(torch.ones(2)), looping(torch.ones(2)))
            return [[node.name for node in graph.graph.nodes if node.op == "call_function"] for graph in made]

        assert graphs() == []
        with dynamo.graphs_before_loops():
            with dynamo.graphs_before_loops():
                assert graphs() == [["mul", "y"]]
                assert dynamo.makes_graphs_before_loops()
            assert graphs() == [["mul", "y"]]
            with pytest.raises(torch._dynamo.exc.Unsupported):
                graphs(fullgraph=True)
        assert graphs() == []
        assert not dynamo.makes_graphs_before_loops()

    def test_dynamo_is_changed_once(self):
        changed = []
        for _ in range(2):
            with dynamo.graphs_before_loops():
                changed.append(InstructionTranslatorBase.raise_loop_graph_break)
        assert changed[0] is changed[1]

    def test_a_size_that_may_vary(self):
        """One graph serves all of it, and none of another dimension."""
        graphs, x = [], torch.ones(3, 2)
        run = compiled(lambda x: x + 1, lambda graph, inputs: graphs.append(graph), dynamic=False)
        dynamo.let_vary(x, 0)
        for given, count in ((x, 1), (torch.ones(5, 2), 1), (torch.ones(5, 4), 2)):
            assert torch.equal(run(given), given + 1)
            assert len(graphs) == count

    def test_nothing_more_is_compiled(self):
        graphs = []
        run = compiled(lambda x: x + 1, lambda graph, inputs: graphs.append(graph), dynamic=False)
        run(torch.ones(2))
        with dynamo.compiling_nothing_more():
            assert run(torch.ones(3)).tolist() == [2, 2, 2]
            assert run(torch.ones(2)).tolist() == [2, 2]
            assert len(graphs) == 1
        run(torch.ones(3))
        assert len(graphs) == 2

    def test_own_code_is_run(self):
        graphs = []
        run = compiled(lambda x: x + 1, lambda graph, inputs: graphs.append(graph), dynamic=False)
        with dynamo.running_eager():
            assert run(torch.ones(2)).tolist() == [2, 2]
            assert not graphs
        run(torch.ones(2))
        assert len(graphs) == 1

    @pytest.mark.parametrize("taking", [dynamo.compiling_nothing_more, dynamo.running_eager])
    def test_other_threads_compile_meanwhile(self, taking):
        """Their calls would run as they are, and nothing would be re-routed."""
        graphs = []
        run = compiled(lambda x: x + 1, lambda graph, inputs: graphs.append(graph), dynamic=False)
        with taking():
            thread = threading.Thread(target=run, args=(torch.ones(2),))
            thread.start()
            thread.join()
            assert len(graphs) == 1
            run(torch.ones(3))
        assert len(graphs) == 1

    def test_a_torch_that_asks_for_the_stance_elsewhere(self, monkeypatch):
        monkeypatch.delattr(torch._dynamo.eval_frame, "_callback_from_stance")
        with dynamo.compiling_nothing_more():
            assert torch._dynamo.eval_frame._stance.stance == "eager_on_recompile"
        assert torch._dynamo.eval_frame._stance.stance == "default"

    def test_a_torch_that_decides_elsewhere(self, monkeypatch):
        monkeypatch.delattr(InstructionTranslatorBase, "raise_loop_graph_break")
        with dynamo.graphs_before_loops():
            assert not hasattr(InstructionTranslatorBase, "raise_loop_graph_break")

    def test_what_a_backend_raised(self):
        own = KeyError("a")
        wrapped = types.SimpleNamespace(inner_exception=own)
        assert dynamo.raised_by_backend(wrapped, KeyError) is own
        assert dynamo.raised_by_backend(own, KeyError) is own
        assert dynamo.raised_by_backend(own, IndexError) is None

    def test_whether_shapes_are_captured(self):
        assert dynamo.captures_dynamic_shapes() is False
        with dynamo.dynamic_shape_capture():
            assert dynamo.captures_dynamic_shapes() is True

    def test_a_module_that_was_compiled_in_place(self):
        layer = nn.Linear(2, 2)
        with dynamo.without_own_compile(layer):
            assert layer._compiled_call_impl is None
        layer._compiled_call_impl = own = lambda x: x
        with contextlib.suppress(KeyError), dynamo.without_own_compile(layer):
            assert layer._compiled_call_impl is None
            raise KeyError
        assert layer._compiled_call_impl is own
        with dynamo.without_own_compile(lambda x: x):
            pass

    def test_a_limit_that_was_met(self):
        counters["unimplemented"].clear()
        assert dynamo.recompile_limit_hint() == ""
        counters["unimplemented"]["something else"] += 1
        assert dynamo.recompile_limit_hint() == ""
        counters["unimplemented"]["Dynamo recompile limit exceeded: 8"] += 1
        assert dynamo.recompile_limit_hint().startswith("Dynamo hit torch._dynamo.config.recompile_limit")
        counters["unimplemented"].clear()


class TestWhereACallIs:
    def test_graph_breaks(self):
        """Dynamo says of a graph whether one ends it; where it compiles nothing it says nothing."""
        assert dynamo.has_graph_break(nn.Module()) is True
        found = []

        def broken(x):
            x = x + 1
            torch._dynamo.graph_break()
            return x * 2

        compiled(broken, lambda graph, inputs: found.append(dynamo.has_graph_break(graph)))(torch.ones(2))
        assert found == [True, False]

    def test_pieces_of_a_graph(self):
        """Dynamo says so of each, and none is all of a call."""
        module, reasons = nn.Module(), []
        assert not dynamo.is_piece(module)
        module.compile_subgraph_reason = types.SimpleNamespace(reason="DDPOptimizer intentional graph-break")

        def seen(graph, inputs):
            reasons.append((dynamo.is_piece(graph), dynamo.has_graph_break(graph), dynamo.has_graph_break(module)))

        compiled(lambda x: x + 1, seen)(torch.ones(2))
        assert dynamo.is_piece(module)
        assert reasons == [(False, False, True)]

    def test_what_inputs_hold_where_the_examples_are_fake(self):
        """The tensor of the call; what an earlier piece computes has none."""
        x, found = torch.ones(2), []

        def seen(graph, inputs):
            [node] = graph.graph.find_nodes(op="placeholder")
            fake = node.meta["example_value"]
            found.extend((dynamo.held_by(node, fake) is x, dynamo.held_by(node, 3), dynamo.is_fake_call()))
            found.append(dynamo.held_by(types.SimpleNamespace(meta={}), fake) is fake)
            with fake.fake_mode:
                found.append(dynamo.is_fake_call())

        compiled(lambda y: y + 1, seen)(x)
        assert found == [True, 3, False, True, True]

    def test_calls_of_compiled_code(self):
        """The outermost on the stack."""
        assert dynamo.current_call() is None
        found, inner = [], torch.compile(lambda x: x + 1, backend="eager")

        def run(*arguments):
            found.append(dynamo.current_call())
            inner(torch.ones(3))
            return arguments

        add = torch.compile(lambda x: x + 1, backend=lambda graph, inputs: run)
        add(torch.ones(2))
        [frame] = found
        assert dynamo.is_compile_wrapper(frame)
        assert frame.f_locals["fn"].__name__ == "<lambda>"
        assert not dynamo.is_compile_wrapper(sys._getframe())
        assert dynamo.current_call() is None

    def test_calls_of_compiled_modules(self):
        """The wrapper, which holds what was compiled; a frame in the same file that calls it holds nothing of it."""
        found = []

        def run(*arguments):
            found.append(dynamo.current_call())
            return arguments

        for module in (nn.Tanh(), nn.Tanh()):
            torch.compile(module, backend=lambda graph, inputs: run)(torch.ones(2))
        first, second = (frame.f_locals["fn"] for frame in found)
        assert first is not second

    def test_frames_that_only_look_like_it(self):
        def _fn():
            return sys._getframe()

        def compile_wrapper():
            return sys._getframe()

        assert not dynamo.is_compile_wrapper(_fn())
        assert not dynamo.is_compile_wrapper(compile_wrapper())

    def test_the_frame_that_torch_compile_was_asked_for(self):
        """Not one that it calls once its graph is broken."""
        assert dynamo.is_outermost() is False
        found = []

        def seen(graph, inputs):
            found.append(dynamo.is_outermost())

        class Inner(nn.Module):
            def forward(self, x):
                torch._dynamo.graph_break()
                return x * 2

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = Inner()

            def forward(self, x):
                return self.inner(x + 1) - 1

        compiled(Outer(), seen)(torch.ones(2))
        assert found[0] is True
        assert False in found
        found.clear()
        compiled(lambda x: x + 1, seen)(torch.ones(2))
        assert found == [True]

    @pytest.mark.parametrize(
        "register",
        [
            lambda module: module.register_forward_hook(lambda module, args, output: output * 2),
            lambda module: module.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
        ],
    )
    def test_hooks_of_the_module_are_a_part_of_its_call(self, register):
        class Own(nn.Module):
            def forward(self, x):
                return x * 3

        found, module = [], Own()
        register(module)
        compiled(module, lambda graph, inputs: found.append(dynamo.is_outermost()))(torch.ones(2))
        assert found == [False, False]
        found.clear()
        torch._dynamo.reset()
        compiled(nn.Sequential(module), lambda graph, inputs: found.append(dynamo.is_outermost()))(torch.ones(2))
        assert found == [True], "they are in its graph"

    def test_what_a_module_is_called_with(self):
        found = []

        class Asks(nn.Module):
            def forward(self, x, scale=1):
                found.append(dynamo.arguments_of(self))
                found.append(dynamo.arguments_of(other))
                return x * scale

        other = nn.Identity()
        asks, x = Asks(), torch.ones(2)
        asks(x, scale=3)
        assert found[0] == ((x,), {"scale": 3})
        assert found[1] is None
        assert dynamo.arguments_of(asks) is None


def added(x):
    return x + 1


class TestCodes:
    def test_codes_that_are_met_for_the_first_time_are_forgotten(self):
        graphs = []

        def met(function):
            compiled(function, lambda graph, inputs: graphs.append(function.__name__), dynamic=False)(torch.ones(2))

        def known():
            return set(dynamo._known_codes()) - dynamo.skipped_codes()

        def other(x):
            return x - 1

        met(added)
        with contextlib.suppress(KeyError), dynamo.forgetting_new_codes():
            met(other)
            assert {added.__code__, other.__code__} <= known()
            raise KeyError
        assert added.__code__ in known()
        assert other.__code__ not in known()
        assert graphs == ["added", "other"]

    def test_the_code_that_is_being_compiled_is_spared(self):
        found = []

        def seen(graph, inputs):
            found.append(dynamo._codes_at_work()[threading.get_ident()])
            with dynamo.forgetting_new_codes():
                torch.compile(lambda x: x - 1, backend="eager")(torch.ones(3))

        add = compiled(added, seen)
        add(torch.ones(2))
        add(torch.ones(2))
        assert found == [[added.__code__]]
        assert dynamo._codes_at_work() == {}

    @pytest.mark.parametrize("in_a_call", [False, True])
    def test_a_code_that_another_thread_waits_to_compile_is_spared(self, in_a_call):
        """Dynamo would write to freed memory. And its thread is not waited for, since it waits for this one."""
        graphs, threads = [], []

        def other(x):
            return x * 3

        def call():
            with dynamo.running if in_a_call else contextlib.nullcontext():
                compiled(other, lambda graph, inputs: graphs.append("other"))(torch.ones(2))

        def seen(graph, inputs):
            with dynamo.forgetting_new_codes():
                threads.append(threading.Thread(target=call))
                threads[0].start()
                while threads[0].ident not in dynamo._codes_at_work():
                    time.sleep(0.001)
                assert other.__code__ in dynamo._known_codes()
            assert [other.__code__] in dynamo._codes_at_work().values()
            graphs.append("added")

        with pytest.MonkeyPatch.context() as patch:
            freed = []
            patch.setattr(torch._C._dynamo.eval_frame, "reset_code", freed.append)
            patch.setattr(dynamo.running, "alone", lambda do: do() or pytest.fail("waits"))
            compiled(added, seen)(torch.ones(2))
        threads[0].join(10)
        assert graphs == ["added", "other"]
        assert other.__code__ not in freed

    def test_codes_of_a_model_are_looked_at_anew(self):
        """And those of what stands in the same files."""
        graphs = []
        for model in (added, nn.Sequential(nn.Identity()), types.SimpleNamespace()):
            run = compiled(added, lambda graph, inputs: graphs.append(graph))
            run(torch.ones(2))
            before = len(graphs)
            dynamo.forget_codes(model)
            run(torch.ones(2))
            assert len(graphs) == before + (model is added)

    def test_codes_that_dynamo_gave_up(self):
        compiled(added, lambda graph, inputs: None)(torch.ones(2))
        assert added.__code__ not in dynamo.skipped_codes()
        dynamo.forget_codes(added)
        assert added.__code__ in dynamo.skipped_codes()


class TestThreadsInCompiledCode:
    """What Dynamo keeps with a code object is freed while nobody uses it."""

    def test_others_are_waited_for_and_none_begins(self):
        running, order = dynamo._Running(), []
        inside, leave, waits, done = (threading.Event() for _ in range(4))

        def call():
            with running, running:
                inside.set()
                leave.wait(10)
                order.append("call")

        def forget():
            inside.wait(10)
            waits.set()
            assert running.alone(lambda: order.append("forget"))
            done.set()

        def later():
            waits.wait(10)
            while not running._waiting and not done.is_set():
                time.sleep(0.001)
            leave.set()
            with running:
                order.append("later")

        threads = [threading.Thread(target=target) for target in (call, forget, later)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert order == ["call", "forget", "later"]
        assert not running._depths

    def test_in_a_call_of_its_own_a_thread_waits_for_nobody(self):
        running, done = dynamo._Running(), []
        with running:
            assert running.alone(lambda: done.append(1))
        assert running.alone(lambda: done.append(2))
        assert done == [1, 2]

    def test_calls_that_do_not_end(self):
        """Threads may wait for each other: then nothing is freed, and calls go on."""
        running, inside, leave = dynamo._Running(), threading.Event(), threading.Event()

        def call():
            with running:
                inside.set()
                leave.wait(10)

        thread = threading.Thread(target=call)
        thread.start()
        inside.wait(10)
        done = []
        assert not running.alone(lambda: done.append(1), seconds=0.01)
        with running:
            leave.set()
        thread.join(10)
        assert done == []

    def test_that_is_told(self, monkeypatch, caplog):
        monkeypatch.setattr(dynamo.running, "alone", lambda do: False)
        dynamo.forget_codes(nn.Linear(2, 2))
        assert "what Dynamo knows of this model's code is kept" in caplog.text


@pytest.mark.slow
def test_first_calls_of_one_class_in_many_threads():
    """In a process of its own, which a segmentation fault ends."""
    program = """
import threading, torch, sere_compile
from tests.zoo.outside.loops import HIDDEN, MaskLoop

def work():
    compiled = sere_compile.compile(MaskLoop().eval(), select_top_k=1, min_active=0, inner="eager")
    with torch.no_grad():
        for tokens in (6, 9, 4):
            compiled(torch.randn(tokens, HIDDEN))

torch.set_num_threads(1)
threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    for _ in range(4):
        subprocess.run(
            [sys.executable, "-P", "-c", program], check=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}
        )
