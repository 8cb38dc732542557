"""`calibrate` against a plain computation that keeps every expert's outputs on every token."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sere_compile
from sere_compile import CalibrationError, ConfigError, calibrate
from sere_compile.calibration import observed_model

from ..passes.moe_modules import DUPLICATE_UNSAFE, EXPERTS, HIDDEN, SUMS_DUPLICATES, Block, Indexed, rows
from ..test_capture import IfAny, prepared
from ..thinned import thinned
from ..tiny_models import EAGER_SLOW, PAIRS, build, gate_names, tokens
from ..zoo.outside.loops import HIDDEN as HIDDEN_OF_LOOPS
from ..zoo.outside.loops import MaskLoop
from .plain import METRICS, expert_outputs, outputs_of, pairs, plain_frobenius, run


class TestNumbers:
    @pytest.mark.parametrize(("method", "kernel"), thinned(METRICS, (0, 3)))
    def test_equals_the_plain_computation(self, qwen, method, kernel):
        """Every metric, to 1e-5; several batches and chunks, but for CKA, whose chunk is its minibatch."""
        batches = [tokens(3, 5)] if method == "cka" else [tokens(3, 5, seed) for seed in range(2)]
        got = run(qwen, batches, method=method, kernel=kernel, chunk=7 if method != "cka" else 64)
        for name, outputs in expert_outputs(qwen, batches).items():
            expected = METRICS[method, kernel](outputs).fill_diagonal_(1.0).float()
            torch.testing.assert_close(got[name], expected, rtol=0, atol=1e-5)
            projection = pairs(outputs, lambda a, b: (a * b).sum() / (b * b).sum()).float()
            torch.testing.assert_close(got.projections[name], projection, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(("name", "experts"), PAIRS)
    def test_every_implementation(self, name, experts):
        """Grouped, gathered and looped experts, in a graph or outside."""
        model, batches = build(name, experts), [tokens(3, 5)]
        got = run(model, batches)
        for gate, outputs in expert_outputs(model, batches).items():
            torch.testing.assert_close(got[gate], plain_frobenius(outputs).float(), rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        "block", thinned([*SUMS_DUPLICATES, *DUPLICATE_UNSAFE], (0, 3, 6)), ids=lambda block: block.__name__
    )
    def test_experts_of_any_code(self, block):
        """Without a module of a known signature the traced dispatch runs; batches of several sizes."""
        if block.__name__ == "IndexPut":
            pytest.skip("a loop over where() is outside of the graph, and its layers are no module with ids")
        module, batches = block(), [rows(), rows(7, seed=1), rows(7, seed=2)]
        got = run(module, batches, chunk=4)
        with torch.no_grad():
            outputs = torch.stack([module.expert(e, torch.cat(batches)) for e in range(EXPERTS)]).double()
        torch.testing.assert_close(got["router"], plain_frobenius(outputs).float(), rtol=0, atol=1e-5)

    def test_what_follows_the_experts_counts(self):
        """Experts in a narrower space: similar is what the model adds, behind the projection back."""

        class Latent(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.up = Indexed(), nn.Linear(HIDDEN, HIDDEN, bias=False)
                self.up.weight.data.normal_(0, 3, generator=torch.Generator().manual_seed(1))

            def forward(self, x):
                ids, weights = self.inner.route(x)
                y = torch.tanh(x[:, None, None, :] @ self.inner.experts[ids])
                return ((y.squeeze(2) @ self.up.weight.T) * weights[..., None]).sum(1)

        module, x = Latent(), rows()
        got = run(module, [x])
        with torch.no_grad():
            outputs = torch.stack([module.up(module.inner.expert(e, x)) for e in range(EXPERTS)]).double()
        torch.testing.assert_close(got["inner.router"], plain_frobenius(outputs).float(), rtol=0, atol=1e-5)

    def test_half_precision_is_summed_in_more(self):
        """The sums over a bfloat16 model's outputs are those in float64, not in bfloat16."""
        model, batches = build("mixtral", dtype=torch.bfloat16), [tokens(8, 12, seed) for seed in range(3)]
        got = run(model, batches, chunk=16)
        for name, outputs in expert_outputs(model, batches).items():
            torch.testing.assert_close(got[name], plain_frobenius(outputs).float(), rtol=0, atol=2e-3)


class TestRunning:
    @pytest.mark.parametrize("how", thinned(["torch.compile", "model.compile"], (0,)))
    def test_compiled_models(self, how):
        """A model that is compiled already is calibrated as it was, and stays compiled."""
        model, batches = build("mixtral"), [tokens(2, 5)]
        expected = run(model, batches)
        if how == "torch.compile":
            model = torch.compile(model, backend="eager")
        else:
            model.compile(backend="eager")
        got = run(model, batches)
        assert got == expected
        assert list(got) == gate_names()
        assert how == "torch.compile" or model._compiled_call_impl is not None

    def test_leaves_the_model_alone(self, qwen):
        """Training mode of each module, weights and outputs are as before."""
        model = copy.deepcopy(qwen)
        model.train()
        model.model.layers[1].eval()
        before = [module.training for module in model.modules()]
        state = {name: value.clone() for name, value in model.state_dict().items()}
        run(model, [tokens(2, 5)])
        assert [module.training for module in model.modules()] == before
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_profile_says_where_it_comes_from_and_fits(self, qwen, tmp_path):
        """Metadata, names and projections; saved, loaded and attached."""
        got = run(qwen, [tokens(2, 5)], method="cka", kernel="rbf", seed=3)
        assert {**got.metadata, "sere_compile": ""} == {
            "method": "cka_rbf", "tokens": "10", "seed": "3", "model_type": "qwen3_moe", "sere_compile": "",
        }  # fmt: skip
        got.save(tmp_path / "p.safetensors")
        loaded = sere_compile.SimilarityProfile.load(tmp_path / "p.safetensors")
        assert loaded == got
        assert loaded.projections.keys() == got.projections.keys() == set(gate_names())
        sere_compile.attach(copy.deepcopy(qwen), loaded)

    def test_shows_a_bar(self, qwen, capsys):
        """tqdm, on request."""
        calibrate(qwen, [tokens(2, 5)], max_tokens=10)
        assert "10/10" in capsys.readouterr().err


class TestErrors:
    def test_too_few_tokens(self, qwen, tmp_path):
        """What there is stays in the resume file, for more batches."""
        path = tmp_path / "state"
        with pytest.raises(CalibrationError, match="hold 10 tokens, padding not counted; max_tokens=50 asks for more"):
            run(qwen, [tokens(2, 5)], max_tokens=50, resume=path)
        more = [tokens(2, 5, seed) for seed in range(5)]
        assert run(qwen, more, max_tokens=50, resume=path).metadata["tokens"] == "50"

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_outputs_that_are_not_finite(self, qwen, value):
        """The gate and the expert are named."""
        model = copy.deepcopy(qwen)
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj[5, 0, 0] = value
        message = r"layers\.1\.mlp\.gate\.weight: the outputs of expert 5 \(of 16\) hold NaN or infinity"
        with pytest.raises(CalibrationError, match=message):
            run(model, [tokens(2, 5)])

    def test_no_gates(self):
        """A dense model."""
        config = LlamaConfig(
            vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        with pytest.raises(CalibrationError, match=r"no MoE gate ran in a graph of this model: see sere_compile\.expl"):
            run(LlamaForCausalLM(config), [tokens(2, 5)])

    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_loop_that_has_to_be_captured(self, compiled):
        """What `sere_compile.compile` captures, `calibrate` does, too: all of the layer's code counts."""

        class Adding(MaskLoop):
            def forward(self, x):
                rows = x.view(-1, HIDDEN_OF_LOOPS)
                weights, ids = torch.topk(self.gate(rows).softmax(-1), 3)
                y = torch.zeros_like(rows)
                for number in range(len(self.experts)):
                    token, slot = torch.where(ids == number)
                    y = y.index_add(0, token, self.expert(number, rows[token]) * weights[token, slot, None])
                return y.view(x.shape)

        model, _, x = prepared(Adding)
        torch._dynamo.reset()
        outputs = torch.stack([model.expert(e, x.view(-1, x.shape[-1])) for e in range(len(model.experts))]).double()
        got = run(sere_compile.compile(model, inner="eager") if compiled else model, [x, x])
        torch.testing.assert_close(got["gate.weight"], plain_frobenius(outputs).float(), rtol=0, atol=1e-5)

    def test_a_captured_loop_that_writes_in_place(self):
        """Its experts cannot be told from the rest: refused, with what to change, and not measured wrongly."""
        model, _, x = prepared(MaskLoop)
        torch._dynamo.reset()
        with pytest.raises(
            CalibrationError, match=r"cannot be run apart .* instead of writing .*: out = out\.index_add"
        ):
            run(model, [x])

    def test_a_loop_that_no_graph_holds(self):
        """The line is named, as `explain` and `compile` name it."""
        model, _, x = prepared(IfAny)
        message = r"gate\.weight ran outside\. test_capture\.py:\d+, `if token\.numel\(\):`, cannot be part"
        with pytest.raises(CalibrationError, match=message):
            run(model, [x])

    def test_experts_that_cannot_be_run(self):
        """Ids that leave the graph, and no module that takes them."""

        class Away(Block):
            def forward(self, x):
                ids, weights = self.route(x)
                torch._dynamo.graph_break()
                return self.away(x, ids, weights)

            @torch._dynamo.disable
            def away(self, x, ids, weights):
                return (torch.tanh(torch.einsum("th,tkhd->tkd", x, self.experts[ids])) * weights[..., None]).sum(1)

        with pytest.raises(CalibrationError, match=r"the experts of router cannot be run: its dispatch is outside"):
            run(Away(), [rows()])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"method": "frobenios"}, "did you mean 'frobenius'"),
            ({"method": "cka", "kernel": "gauss"}, "unknown kernel 'gauss'"),
            ({"kernel": "rbf"}, "kernel='rbf' is for method=\"cka\""),
            ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
            ({"chunk": 2.5}, "chunk must be an integer of at least 1, got 2.5"),
            ({"seed": -1}, "seed must be an integer from 0 to 18446744073709551615, got -1"),
            ({"seed": 10**30}, "seed must be an integer from 0 to"),
        ],
    )
    def test_options(self, qwen, options, message):
        """Before the model runs."""
        with pytest.raises(ConfigError, match=message):
            run(qwen, [tokens(2, 5)], **options)


class TestDataFree:
    def test_draws_what_each_layer_sees(self, monkeypatch):
        """Channel by channel the scale of the norm in front of the gate, in each layer its own."""
        model, drawn = build("qwen3_moe"), {}
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.post_attention_layernorm.weight.copy_(torch.rand(32, generator=generator) * 4 - 2)
        original = observed_model.of_module

        def of_module(experts, hidden, slots, size):
            drawn.setdefault(id(experts), hidden)
            return original(experts, hidden, slots, size)

        monkeypatch.setattr(observed_model, "of_module", of_module)
        profile = run(model, None, max_tokens=4000)
        assert profile.metadata["tokens"] == "4000"
        for layer in model.model.layers:
            hidden, gain = drawn[id(layer.mlp.experts)], layer.post_attention_layernorm.weight.detach()
            assert hidden.shape == (4000, 32)
            torch.testing.assert_close(hidden.std(0), gain.abs(), rtol=0.06, atol=0)
            assert hidden.mean(0).abs().max() < 0.1

    @pytest.mark.parametrize("experts", EAGER_SLOW)
    def test_equals_the_plain_computation(self, experts):
        """On the hidden states that were drawn, whichever way the experts run; the same for the same seed."""
        model = build("mixtral", experts)
        got = run(model, None, max_tokens=64)
        hidden = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
        layers = model.model.layers
        for name, layer in zip(gate_names(), layers, strict=True):
            outputs = outputs_of(layer.mlp.experts, hidden * layer.post_attention_layernorm.weight)
            torch.testing.assert_close(got[name], plain_frobenius(outputs).float(), rtol=0, atol=1e-5)

    @pytest.mark.slow
    def test_is_seeded(self, qwen):
        """The same seed gives the same profile, bit for bit, another one another."""
        got = run(qwen, None, max_tokens=64)
        assert got == run(qwen, None, max_tokens=64)
        assert got != run(qwen, None, max_tokens=64, seed=1)

    @pytest.mark.slow
    def test_scale_matters(self):
        """A norm that silences a channel silences what experts make of it: two that differ there alone are twins."""
        model = build("mixtral")
        with torch.no_grad():
            for layer in model.model.layers:
                experts = layer.mlp.experts
                experts.gate_up_proj[5], experts.down_proj[5] = experts.gate_up_proj[3], experts.down_proj[3]
                experts.gate_up_proj[5, :, 7] += 1
                layer.post_attention_layernorm.weight[7] = 0
        profile = run(model, None)
        for name in gate_names():
            assert profile[name][3, 5] == 1
        torch.compile(model, backend=sere_compile.sere_backend.with_options(select_top_k=1, inner="eager"))(tokens())
        for name in gate_names():
            assert sere_compile.similarity.binding.lookup(model.get_parameter(name)).matrix[3, 5] == 1

    def test_without_a_norm(self, caplog):
        """Standard normal, and the log says why."""
        with caplog.at_level(logging.INFO, logger="sere_compile"):
            profile = run(Indexed(), None, example=rows(), max_tokens=32)
        assert "hidden states for router are drawn standard normal: no norm was found" in caplog.text
        x = torch.randn(32, HIDDEN, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            outputs = torch.stack([Indexed().expert(e, x) for e in range(EXPERTS)]).double()
        torch.testing.assert_close(profile["router"], plain_frobenius(outputs).float(), rtol=0, atol=1e-5)

    def test_a_model_that_has_no_example(self):
        """Tracing needs one call."""
        with pytest.raises(CalibrationError, match="calibrating Indexed without batches needs example="):
            run(Indexed(), None)
