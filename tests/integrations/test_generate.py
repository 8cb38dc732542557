"""`generate_config`: what generate is told, what is refused when it is made, and README's own lines on a CPU."""

import re
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

import sere_compile
from sere_compile.integrations.transformers import SHIPPED

from ..tiny_models import build, tokens

README = Path(__file__).parents[2] / "README.md"


def decode(model, ids, compile_config):
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), compile_config=compile_config, **settings)


def test_generate_re_routes_on_a_cpu():
    """Nothing else is needed: the decode step is compiled, and counts say that it re-routes."""
    model, ids = build("qwen3_moe"), tokens(4, 5)
    decode(model, ids, sere_compile.generate_config(select_top_k=1, collect_stats=True, inner="eager"))
    counted = sere_compile.stats(model)
    assert len(counted) == 2
    assert all(gate.calls == 5 and gate.slots_changed for gate in counted.values())


def test_modes_become_options():
    """torch.compile takes a mode or options; CUDA graphs come by default, as with transformers' own config."""
    made = sere_compile.generate_config(select_top_k=2)
    assert (made.backend, made.mode) == ("sere", None)
    assert made.options == {"triton.cudagraphs": True, "select_top_k": 2}
    assert sere_compile.generate_config(mode=None, select_top_k=2).options == {"select_top_k": 2}
    assert sere_compile.generate_config(inner="eager").options == {"inner": "eager"}
    assert made == sere_compile.generate_config(select_top_k=2)
    assert '"select_top_k": 2' in GenerationConfig(compile_config=made).to_json_string()


def test_guards_are_filtered_as_torch_compile_does():
    """And the backend, which knows no such option, does not meet it."""
    asked = []

    def keep_none(guards):
        asked.append(len(guards))
        return [False] * len(guards)

    model, ids = build("qwen3_moe"), tokens(4, 5)
    config = sere_compile.generate_config(select_top_k=1, inner="eager", guard_filter_fn=keep_none)
    want = decode(model, ids, sere_compile.generate_config(select_top_k=1, inner="eager"))
    torch.compiler.reset()
    assert torch.equal(decode(model, ids, config), want)
    assert asked
    assert all(asked)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"selecttopk": 2}, "did you mean 'select_top_k'"),
        ({"select_top_k": 0}, "at least 1"),
        ({"mode": "fast"}, "unknown mode 'fast'; torch.compile has default, .*reduce-overhead"),
        ({"mode": "reduce-overhead", "inner": "eager"}, 'is for inner="inductor"'),
        ({"capture": "auto"}, r"compile the model with sere_compile\.compile"),
    ],
)
def test_bad_options_raise_when_it_is_made(options, told):
    with pytest.raises(sere_compile.ConfigError, match=told):
        sere_compile.generate_config(**options)


def test_readme_on_a_cpu():
    """README's first lines, with the shipped model in place of a large one: they change what it says."""
    code = re.search(r"```python\n(from transformers import .*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    for old, new in (
        ('"Qwen/Qwen1.5-MoE-A2.7B"', repr(str(SHIPPED / "qwen3"))),
        ('"cuda"', '"cpu"'),
        ("generate_config(", 'generate_config(inner="eager", collect_stats=True, '),
        ("max_new_tokens=32", "do_sample=False, max_new_tokens=12"),
    ):
        assert old in code, old
        code = code.replace(old, new)
    names = {}
    exec(code, names)
    model, inputs = names["model"], names["inputs"]
    assert all(gate.slots_changed for gate in sere_compile.stats(model).values())
    unchanged = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert not torch.equal(names["output"], unchanged)
