"""Options that cannot act: named once, with the reason, by whoever is asked."""

import logging

import pytest
import torch

import sere_compile
from sere_compile import SereConfig, SereError
from sere_compile.idle import never_reached, tell_once, too_many_primary

from .compiled import logits
from .tiny_models import build, random_profile, tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(autouse=True)
def told_anew():
    tell_once.reset()


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_what_can_act():
    matrix = torch.tensor([[1.0, 0.4], [0.4, 1.0]])
    assert too_many_primary(SereConfig(select_top_k=4), 4) == ""
    assert too_many_primary(SereConfig(select_top_k="auto", max_active=9), 4) == ""
    assert never_reached(0.4, matrix) == never_reached("q0.5", matrix) == never_reached(0.0, matrix) == ""
    assert "at most 0.4" in never_reached(0.5, matrix)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        pytest.param(
            {"select_top_k": 9},
            "select_top_k=9 is more than K = 4: every expert of a token stays",
            marks=pytest.mark.slow,
        ),
        ({"select_top_k": 1, "threshold": 2.0}, "threshold=2 is above every similarity, at most"),
    ],
)
def test_the_backend_warns_once_and_explain_says_it(caplog, options, told):
    model, ids = build("qwen3_moe"), tokens()
    sere_compile.attach(model, random_profile(model))
    compiled = torch.compile(model, backend="sere", options={**options, "inner": "eager"})
    for _ in range(2):
        torch.testing.assert_close(logits(compiled, ids), logits(model, ids))
    [message] = warnings_of(caplog)
    assert told in message
    assert message.startswith("model.layers.0.mlp.gate.weight: ")
    torch._dynamo.reset()
    report = sere_compile.explain(model, ids, use_cache=False, config=SereConfig(**options))
    assert all(told in row.reason for row in report.gates)
    sere_compile.evaluate(model, ids, decode_batch=4, **options)
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("select", [4, 9])
def test_statistics_say_why_nothing_is_counted(select):
    """Not that collect_stats is missing: it was given."""
    model, ids = build("qwen3_moe"), tokens()
    options = {"select_top_k": select, "collect_stats": True, "inner": "eager"}
    logits(torch.compile(model, backend="sere", options=options), ids)
    with pytest.raises(SereError, match=rf"collect_stats=True, and nothing .*gate\.weight: .*{select}") as raised:
        sere_compile.stats(model)
    assert "compile the model with" not in str(raised.value)
