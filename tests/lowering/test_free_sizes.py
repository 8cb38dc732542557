"""`dynamic_shapes="auto"`, the names of axes, inputs and outputs in files, and the warning where sizes are fixed."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from sere_compile import SereConfig
from sere_compile.errors import LoweringError
from sere_compile.lowering.decode_step import DecodeStep
from sere_compile.lowering.export import export_rewritten
from sere_compile.lowering.free_sizes import free_sizes

from .. import tiny_models
from .models import SmallMoE, hidden_states, small_profile

FREE = torch.export.Dim.DYNAMIC


class Tokens(SmallMoE):
    """[B, L, width] with a mask and an option, as models take them."""

    def forward(self, hidden, attention_mask=None, scale=1.0, **others):
        batch, length, width = hidden.shape
        out = super().forward(hidden.reshape(-1, width)).view(batch, length, width)
        return {"logits": out * scale, "kept": [out * attention_mask[..., None]]}


HIDDEN = hidden_states(12).view(3, 4, 8)
MASK = torch.ones(3, 4, dtype=torch.int64)


def test_batch_and_sequence_of_every_input():
    sizes = free_sizes(Tokens(), (HIDDEN,), {"attention_mask": MASK, "scale": 2.0, "extra": torch.zeros(3)})
    assert {name: None if size is None else list(size) for name, size in sizes.items()} == {
        "hidden": [0, 1],
        "attention_mask": [0, 1],
        "scale": None,
        "extra": [0],
    }
    # One size for all.
    assert sizes["hidden"][0] is sizes["attention_mask"][0] is sizes["extra"][0]
    assert free_sizes(SmallMoE(), (hidden_states(5),), {}) == {"hidden": {0: FREE}}


def test_an_example_that_would_be_fixed():
    with pytest.raises(LoweringError, match=r"examples of at least 2 in every free size.* attention_mask is \[3, 1\]"):
        free_sizes(Tokens(), (HIDDEN,), {"attention_mask": MASK[:, :1]})


def test_fixed_sizes_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        export_rewritten(SmallMoE().eval(), (hidden_states(5),), profile=small_profile(), dynamic_shapes="auto")
        assert not caplog.records
        export_rewritten(SmallMoE().eval(), (hidden_states(5),), profile=small_profile())
    assert 'dynamic_shapes="auto" leaves batch and sequence free' in caplog.text


def shapes(path):
    """Sizes of the inputs and of the outputs of a file, by name."""
    onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
    graph = onnx.load(path).graph
    return [
        {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in values}
        for values in (graph.input, graph.output)
    ]


@pytest.mark.slow
def test_names_in_a_file(tmp_path):
    lowering = pytest.importorskip("sere_compile.lowering.onnx")
    done = lowering.export(
        Tokens().eval(), (HIDDEN,), tmp_path / "m.onnx", kwargs={"attention_mask": MASK}, profile=small_profile(),
        dynamic_shapes="auto",
    )  # fmt: skip
    assert shapes(done.path) == [
        {"hidden": ["batch", "sequence", 8], "attention_mask": ["batch", "sequence"]},
        {"logits": ["batch", "sequence", 8], "kept.0": ["batch", "sequence", 8]},
    ]
    done = lowering.export(
        nn.Linear(8, 8), (hidden_states(2),), tmp_path / "m.onnx", dynamic_shapes="auto", allow_no_gates=True
    )
    assert shapes(done.path) == [{"input": ["batch", 8]}, {"output": ["batch", 8]}]


@pytest.mark.slow
def test_names_of_a_decode_step(tmp_path):
    """Those of the model's cache; and of DeepSeek, whose keys and values differ in width."""
    lowering = pytest.importorskip("sere_compile.lowering.onnx")
    model = tiny_models.grouped_deepseek(3)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    step = DecodeStep(model, 6).eval()
    done = lowering.export(
        step, step.example_inputs(), tmp_path / "m.onnx", config=SereConfig(select_top_k=1), dynamic_shapes="auto"
    )
    keys, values = step.empty_cache(2)
    cache = {"0.key": ["batch", *keys[0].shape[1:]], "0.value": ["batch", *values[0].shape[1:]]}
    assert cache["0.key"] != cache["0.value"]
    assert shapes(done.path) == [
        {"input_ids": ["batch", 1], "position": []} | {f"past_key_values.{name}": size for name, size in cache.items()},
        {"logits": ["batch", tiny_models.VOCABULARY]} | {f"present.{name}": size for name, size in cache.items()},
    ]
