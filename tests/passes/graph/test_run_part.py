"""`run_graph`: a graph on given values."""

import torch
from torch.fx import symbolic_trace

from sere_compile.passes.graph.run_part import run_graph


def test_half_precision_becomes_single():
    graph = symbolic_trace(lambda x: x.to(torch.bfloat16).half() * 1.001)
    given = {next(iter(graph.graph.nodes)): torch.ones(3)}
    values = {dtype: list(run_graph(graph.graph, graph, given, single=dtype).values())[-1] for dtype in (True, False)}
    assert values[True].dtype is torch.float32
    assert values[False].dtype is torch.float16


def test_noise_is_the_same_and_generators_stay():
    graph = symbolic_trace(lambda x: x + torch.randn_like(x))
    given = {next(iter(graph.graph.nodes)): torch.ones(3)}
    state = torch.get_rng_state()
    first, second = (list(run_graph(graph.graph, graph, given).values())[-1] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_writes_go_to_copies():
    graph = symbolic_trace(lambda x: x.add_(1))
    value = torch.zeros(2)
    run_graph(graph.graph, graph, {next(iter(graph.graph.nodes)): value})
    assert torch.equal(value, torch.zeros(2))
