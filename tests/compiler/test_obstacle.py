"""The line that keeps an expert loop out of every graph."""

import pytest
import torch
from torch import nn

from sere_compile.compiler import obstacle
from sere_compile.compiler.obstacle import Obstacle, diagnose, find_obstacle, model_of

from ..zoo.outside.loops import HIDDEN, CountLoop, MaskLoop, prepared


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_count_that_is_compared():
    model, _, x = prepared(CountLoop)
    found = find_obstacle(model, (x,), {})
    assert found.place.startswith("loops.py:")
    assert found.code in (
        "if counts[number] == 0:",
        "counts = torch.bincount(ids.flatten(), minlength=EXPERTS).tolist()",
    )
    assert found.why


def test_a_loop_that_can_be_captured_has_none():
    """The words say what captures it."""
    model, _, x = prepared(MaskLoop)
    assert find_obstacle(model, (x,), {}) is None
    assert "sere_compile.compile(model, ...), which captures" in diagnose(model, (x,), {})
    assert "does not help here: move router" in diagnose(model, (x,), {}, captured=True)


def test_a_compiled_model_stays_compiled():
    """Asking costs no graph of the user's."""
    model, _, x = prepared(MaskLoop)
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    compiled(x)
    number = len(graphs)
    find_obstacle(compiled, (x,), {})
    compiled(x)
    assert len(graphs) == number


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("if tok.numel():", "drop the condition"),
        ("for e in ids.unique().tolist():", "loop over range"),
        ("rows = library(x)", "move router and top-k"),
    ],
)
def test_remedies(code, remedy):
    text = str(Obstacle("loop.py:3", code, "why"))
    assert text.startswith(f"loop.py:3, `{code}`, cannot be part of a graph (why): {remedy}")


def test_what_is_ahead_of_a_loop_can_be_compiled():
    """Said to who has not tried that."""
    model, _, x = prepared(CountLoop)
    assert "sere_compile.compile(model, ...), which compiles what is ahead" in diagnose(model, (x,), {})
    assert "what is ahead" not in diagnose(model, (x,), {}, captured=True)


def test_where_no_line_is_named():
    assert str(Obstacle("", "", "why")).startswith("Dynamo finds no graph that holds all of it (why): move router")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("\n  \n  It is so.  \nMore.", "It is so"),
        ("First\n  Explanation: Why it is so. (details)\nExplanation: more", "Why it is so. (details)"),
        ("Explanation: Why it is so.  (details)", "Why it is so"),
        ("", "ValueError"),
        ("One\nExplanation: For one of these reasons:\n- this.\n- or that", "this"),
        ("What leads nowhere:", "ValueError"),
    ],
)
def test_the_first_words_that_say_why(words, sentence):
    assert obstacle._sentence(ValueError(words)) == sentence


def test_the_model_of_a_call():
    module = nn.Linear(HIDDEN, HIDDEN)
    compiled = torch.compile(module, backend="eager")
    assert model_of(module) is model_of(module.__call__) is model_of(compiled) is module
    assert model_of(len) is None


class Branching(nn.Module):
    """The graph ends where a branch depends on data."""

    def forward(self, x):
        y = x * 2
        if y.sum() > 1e9:
            y = y + 1
        return y


def test_a_branch_behind_a_graph():
    """The part in front of it is a graph, the whole is none."""
    found = find_obstacle(Branching(), (torch.ones(3),), {})
    assert found.code == "if y.sum() > 1e9:"
