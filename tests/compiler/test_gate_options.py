"""What differs from gate to gate: thresholds by share, projection coefficients, `per_gate`; against an eager oracle."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from torch import nn

import sere_compile
from sere_compile import ConfigError, ProfileError, SereConfig, SimilarityProfile, sere_backend
from sere_compile.compiler import gate_options
from sere_compile.evaluation import ConfiguredRule
from sere_compile.evaluation.evaluate import _Recorder
from sere_compile.evaluation.routing import RoutedModel
from sere_compile.experts.owner import Owners
from sere_compile.similarity.threshold import resolve_threshold
from sere_compile.testing import oracle_routing

from ..compiled import CountingInner, logits
from ..tiny_models import EAGER_SLOW, build, gate_names, random_profile, tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

FIRST, SECOND = gate_names()


@pytest.fixture(scope="module")
def qwen():
    """A model of two layers, its profile with random projections, and token ids."""
    model = build("qwen3_moe")
    model.config.use_cache = False  # caches cannot be exported
    plain = random_profile(model)
    generator = torch.Generator().manual_seed(5)
    projections = {name: torch.randn(matrix.shape, generator=generator) for name, matrix in plain.items()}
    profile = SimilarityProfile(dict(plain), {"method": "random"}, projections)
    sere_compile.attach(model, profile)
    return model, profile, tokens()


def compiled_logits(model, ids, **options):
    return logits(torch.compile(model, backend=sere_backend.with_options(**{"inner": "eager", **options})), ids)


def oracle_logits(model, profile, ids, per_gate):
    """Logits where each gate has its own arguments of `oracle_routing`; a gate without any is left alone."""
    with contextlib.ExitStack() as stack:
        for name, (select_top_k, options) in per_gate.items():
            stack.enter_context(oracle_routing(model, {name: profile[name]}, select_top_k, **options))
        return logits(model, ids)


class TestThreshold:
    def test_backend_equals_the_oracle(self, qwen):
        """Each layer has its own number for "q0.4", in one graph; the report shows it."""
        model, profile, ids = qwen
        expected = oracle_logits(model, profile, ids, {n: (1, {"threshold": "q0.4"}) for n in gate_names()})
        got = compiled_logits(model, ids, select_top_k=1, threshold="q0.4")
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        without = oracle_logits(model, profile, ids, {n: (1, {}) for n in gate_names()})
        assert not torch.allclose(expected, without, atol=1e-3), "no expert is critical"
        report = sere_compile.explain(model, ids, config=SereConfig(threshold="q0.4"), use_cache=False)
        resolved = [resolve_threshold("q0.4", profile[name]) for name in gate_names()]
        assert [row.threshold for row in report.rewritten] == pytest.approx(resolved)
        assert f"{resolved[0]:.4g}" in str(report)

    def test_layers_that_share_a_graph_have_numbers_of_their_own(self, qwen):
        """The number is in the matrix, not in the graph: layers compiled one by one compile once."""
        model, profile, ids = qwen
        counter = CountingInner()
        backend = sere_backend.with_options(select_top_k=1, threshold="q0.4", inner=counter)
        try:
            for layer in model.model.layers:
                layer.compile(backend=backend)
            got = logits(model, ids)
        finally:
            for layer in model.model.layers:
                layer._compiled_call_impl = None
        expected = oracle_logits(model, profile, ids, {n: (1, {"threshold": "q0.4"}) for n in gate_names()})
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert counter.graphs == 1


class TestProjection:
    @pytest.mark.parametrize("experts", EAGER_SLOW)
    def test_backend_equals_the_oracle(self, qwen, experts):
        """Sum-type dispatches and merged ones: weights of re-routed slots are scaled by their gate's coefficients."""
        model, profile, ids = qwen
        model.set_experts_implementation(experts)
        try:
            options = {"projections": profile.projections}
            expected = oracle_logits(model, profile, ids, dict.fromkeys(gate_names(), (1, options)))
            got = compiled_logits(model, ids, select_top_k=1, substitution="projection")
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            plain = oracle_logits(model, profile, ids, {n: (1, {}) for n in gate_names()})
            assert not torch.allclose(expected, plain, atol=1e-2), "nothing is scaled"
        finally:
            model.set_experts_implementation("grouped_mm")

    def test_compiled_equals_the_oracle(self, device):
        """Gather and product behind AOTAutograd; on a GPU in Inductor's kernels."""
        model = build("mixtral", "batched_mm", device=device)
        plain = random_profile(model)
        projections = {name: matrix / 2 for name, matrix in plain.items()}
        profile, ids = SimilarityProfile(dict(plain), None, projections), tokens(device=device)
        sere_compile.attach(model, profile)
        options = {"projections": projections}
        expected = oracle_logits(model, profile, ids, dict.fromkeys(gate_names(), (1, options)))
        inner = "inductor" if device == "cuda" else "aot_eager"
        got = compiled_logits(model, ids, select_top_k=1, substitution="projection", inner=inner)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    def test_s_equal_k_changes_no_bit(self, qwen):
        """The identity needs no coefficients."""
        model, _, ids = qwen
        assert torch.equal(compiled_logits(model, ids, select_top_k=4, substitution="projection"), logits(model, ids))

    def test_bfloat16_weights_stay_in_their_dtype(self, qwen):
        """Coefficients are float32, the scaled weights have the model's dtype again."""
        _, profile, ids = qwen
        half = build("qwen3_moe", dtype=torch.bfloat16)
        sere_compile.attach(half, profile)
        got = compiled_logits(half, ids, select_top_k=1, substitution="projection")
        assert got.dtype is torch.bfloat16

    @pytest.mark.slow
    def test_probing_gives_coefficients(self):
        """With nothing attached twins get the coefficient 1 and a doubled expert 2, as the oracle shows."""
        model, ids = build("mixtral"), tokens()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.experts.gate_up_proj[5] = layer.mlp.experts.gate_up_proj[3]
                layer.mlp.experts.down_proj[5] = 2 * layer.mlp.experts.down_proj[3]
        got = compiled_logits(model, ids, select_top_k=1, substitution="projection")
        entries = {name: sere_compile.similarity.binding.lookup(model.get_parameter(name)) for name in gate_names()}
        for entry in entries.values():
            assert entry.projection[5, 3] == pytest.approx(2, rel=1e-4)
            assert entry.projection[3, 5] == pytest.approx(0.5, rel=1e-4)
        matrices = {name: entry.matrix for name, entry in entries.items()}
        options = {"projections": {name: entry.projection for name, entry in entries.items()}}
        expected = oracle_logits(model, matrices, ids, dict.fromkeys(gate_names(), (1, options)))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    def test_profile_without_coefficients(self):
        """An error that names what makes them, not plain re-routing."""
        model = build("mixtral")
        sere_compile.attach(model, random_profile(model))
        message = r"has none for .*: make one with .*calibrate"
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message) as e:
            compiled_logits(model, tokens(), substitution="projection")
        assert isinstance(e.value.inner_exception, ProfileError)

    @pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_rewrite_equals_the_oracle(self, qwen, dynamic):
        """An exported program has both matrices as buffers and the numbers of the backend."""
        model, profile, ids = qwen
        shapes = {"input_ids": {0: torch.export.Dim("batch", min=2)}} if dynamic else None
        with torch.no_grad():
            program = torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes=shapes)
        config = SereConfig(select_top_k=1, substitution="projection", threshold="q0.4")
        done = sere_compile.rewrite(program, profile=profile, config=config)
        options = {"projections": profile.projections, "threshold": "q0.4"}
        for other in (ids, tokens(7))[: 1 + dynamic]:
            expected = oracle_logits(model, profile, other, dict.fromkeys(gate_names(), (1, options)))
            with torch.no_grad():
                got = done.module()(input_ids=other).logits
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        decomposed = done.run_decompositions()
        with torch.no_grad():
            got = decomposed.module()(input_ids=ids).logits
        expected = oracle_logits(model, profile, ids, dict.fromkeys(gate_names(), (1, options)))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    def test_rewrite_of_a_profile_without_coefficients(self, qwen):
        """Refused with the same hint."""
        model, profile, ids = qwen
        with torch.no_grad():
            program = torch.export.export(model, (ids,))
        config = SereConfig(substitution="projection")
        with pytest.raises(ProfileError, match=r"this profile has none for .*: make one with sere_compile\.calibrate"):
            sere_compile.rewrite(program, profile=SimilarityProfile(dict(profile)), config=config)


OPTIONS = {FIRST: {"select_top_k": 1}, "*.1.mlp.*": {"threshold": "q0.4", "substitution": "projection"}}


class TestPerGate:
    def expected(self, model, profile, ids, swapped=False):
        first, second = (FIRST, SECOND) if not swapped else (SECOND, FIRST)
        options = {"threshold": "q0.4", "projections": profile.projections}
        return oracle_logits(model, profile, ids, {first: (1, {}), second: (2, options)})

    def test_backend_equals_the_oracle(self, qwen):
        """Each gate of a graph has the options of its own name; the report shows them."""
        model, profile, ids = qwen
        expected = self.expected(model, profile, ids)
        assert not torch.allclose(expected, self.expected(model, profile, ids, swapped=True), atol=1e-2)
        got = compiled_logits(model, ids, select_top_k=2, per_gate=OPTIONS)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        config = SereConfig(select_top_k=2, per_gate=OPTIONS)
        rows = sere_compile.explain(model, ids, config=config, use_cache=False).rewritten
        assert [(row.select_top_k, row.substitution) for row in rows] == [(1, "reroute"), (2, "projection")]

    def test_layers_that_share_code_get_graphs_of_their_own(self, qwen):
        """Dynamo compiles again for a layer with other options, and only then."""
        model, profile, ids = qwen
        counter = CountingInner()
        backend = sere_backend.with_options(select_top_k=2, per_gate=OPTIONS, inner=counter)
        layers = model.model.layers
        try:
            for layer in layers:
                layer.compile(backend=backend)
            for _ in range(2):
                got = logits(model, ids)
        finally:
            for layer in layers:
                layer._compiled_call_impl = None
        torch.testing.assert_close(got, self.expected(model, profile, ids), rtol=1e-4, atol=1e-4)
        assert counter.graphs == 2
        torch._dynamo.reset()
        alike = sere_backend.with_options(select_top_k=2, per_gate={"*": {"select_top_k": 1}}, inner=counter)
        try:
            for layer in layers:
                layer.compile(backend=alike)
            logits(model, ids)
        finally:
            for layer in layers:
                layer._compiled_call_impl = None
        assert counter.graphs == 3, "equal options share a graph"

    def test_a_graph_without_the_guard_is_an_error(self, qwen, monkeypatch):
        """One layer's options are never applied to another, even where Dynamo takes no guard."""
        model, _, ids = qwen
        monkeypatch.setattr(gate_options.dynamo, "guard_input", lambda *arguments: False)
        backend = sere_backend.with_options(select_top_k=2, per_gate=OPTIONS, inner="eager")
        try:
            for layer in model.model.layers:
                layer.compile(backend=backend)
            with pytest.raises(ConfigError, match=r"gives model\.layers\.1\.mlp\.gate\.weight other options"):
                logits(model, ids)
        finally:
            for layer in model.model.layers:
                layer._compiled_call_impl = None

    def test_later_patterns_win(self):
        """All patterns that match count, option by option; a number in place of "auto" drops the budget."""
        per_gate = {"a.*": {"select_top_k": 3, "min_active": 0}, "a.b": {"select_top_k": 1}}
        config = SereConfig(select_top_k="auto", max_active=9, per_gate=per_gate)
        own = config.for_gate("a.b")
        assert (own.select_top_k, own.max_active, own.min_active, own.per_gate) == (1, None, 0, ())
        assert config.for_gate("a.c").select_top_k == 3
        assert config.for_gate("b").max_active == 9

    def test_equal_options_are_equal_backends(self):
        """A dict makes no backend anew: it is kept as a value."""
        backends = [sere_backend.with_options(per_gate={"a": {"threshold": 0.1, "select_top_k": 1}}) for _ in "ab"]
        assert backends[0] == backends[1]
        assert hash(backends[0]) == hash(backends[1])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"a": {"treshold": 0.1}}, r"per_gate\['a'\]: 'treshold' is no option of a gate; did you mean 'threshold'"),
            ({"a": {"inner": "eager"}}, "'inner' is no option of a gate"),
            ({"a": {"threshold": "q2"}}, r"per_gate\['a'\]: threshold must be"),
            ({"a": {"max_active": 3}}, r"per_gate\['a'\]: select_top_k=\"auto\" and max_active go together"),
            ({"a": 1}, "per_gate must be"),
            ([("a", {})], "per_gate must be"),
        ],
    )
    def test_wrong_options(self, options, message):
        """Errors name the pattern and the option."""
        with pytest.raises(ConfigError, match=message):
            SereConfig(per_gate=options)

    @pytest.mark.slow
    def test_pattern_without_a_gate_is_told(self, caplog):
        """Once a model; with strict=True it is an error."""
        model, ids = build("qwen3_moe"), tokens()
        sere_compile.attach(model, random_profile(model))
        per_gate = {"model.layers.7.*": {"select_top_k": 1}, FIRST: {"select_top_k": 1}}
        with caplog.at_level(logging.WARNING, logger="sere_compile"):
            compiled_logits(model, ids, per_gate=per_gate)
            torch._dynamo.reset()
            compiled_logits(model, ids, per_gate=per_gate)
        told = [r.getMessage() for r in caplog.records if "per_gate" in r.getMessage()]
        assert told == [
            f"per_gate: no gate of Qwen3MoeForCausalLM matches 'model.layers.7.*'; gates are named like {FIRST}"
        ]
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no gate of"):
            compiled_logits(build("qwen3_moe"), ids, per_gate=per_gate, strict=True)

    def test_rewrite(self, qwen):
        """A traced program takes them as well, and tells of a pattern that matches none of its gates."""
        model, profile, ids = qwen
        with torch.no_grad():
            program = torch.export.export(model, (ids,))
        done = sere_compile.rewrite(program, profile=profile, config=SereConfig(select_top_k=2, per_gate=OPTIONS))
        with torch.no_grad():
            got = done.module()(ids).logits
        torch.testing.assert_close(got, self.expected(model, profile, ids), rtol=1e-4, atol=1e-4)
        config = SereConfig(per_gate={"nothing": {"select_top_k": 1}}, strict=True)
        with pytest.raises(ConfigError, match="no gate of the program matches 'nothing'"):
            sere_compile.rewrite(program, profile=profile, config=config)


@pytest.mark.slow
def test_evaluator_does_what_the_backend_does(qwen):
    """Options of all kinds at once: one forward with every position as a batch of its own, here of one position."""
    model, profile, _ = qwen
    ids = tokens(batch=5, length=1)
    options = {"select_top_k": 1, "substitution": "projection", "per_gate": {SECOND: {"threshold": "q0.4"}}}
    expected = compiled_logits(model, ids, **options)
    routed = RoutedModel(model)
    rule = ConfiguredRule(SereConfig(**options), profile, profile.projections)
    routed.decide = _Recorder(rule, torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(routed(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


class Routers(nn.Module):
    """Two routers, and what is none: a vector, and a matrix of other sizes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.other = nn.Linear(6, 6)


class TestPatternsOfAModel:
    """Asked at the first of its gates that is seen."""

    CONFIG = SereConfig(per_gate={"second.*": {"select_top_k": 1}, "o*": {"select_top_k": 2}})

    def told(self, model, caplog, config=CONFIG, experts=8):
        caplog.clear()
        owner = None if model is None else Owners().find(model.first.weight)
        gate_options.tell_unknown_of_model(config, owner, experts)
        return caplog.messages

    def test_a_matrix_with_a_row_or_column_for_each_expert_may_be_a_router(self, caplog):
        assert self.told(Routers(), caplog) == [
            "per_gate: no gate of Routers matches 'o*'; gates are named like first.weight"
        ]
        assert self.told(Routers(), caplog, experts=6) == []
        assert self.told(Routers(), caplog, self.CONFIG.replace(per_gate={"*.bias": {"select_top_k": 1}}))

    def test_a_model_is_looked_through_once_for_each_set_of_patterns(self, caplog):
        model = Routers()
        assert len(self.told(model, caplog)) == 1
        assert self.told(model, caplog) == []
        assert len(self.told(model, caplog, SereConfig(per_gate={"third.*": {"select_top_k": 1}}))) == 1

    def test_a_weight_without_a_model_tells_nothing(self, caplog):
        assert self.told(None, caplog) == []

    def test_a_compiled_part_is_named_without_its_wrapper(self, caplog):
        model = Routers()
        wrapper = nn.Module()
        wrapper._orig_mod = model.second
        model.second = wrapper
        assert self.told(model, caplog, SereConfig(per_gate={"second.weight": {"select_top_k": 1}})) == []

    def test_a_gate_has_the_name_that_its_weight_got_first(self):
        model = Routers()
        config = SereConfig(select_top_k=3, per_gate={"first.*": {"select_top_k": 1}, "mine": {"select_top_k": 2}})
        weight, alone = model.first.weight, nn.Parameter(torch.zeros(8, 6))
        assert gate_options.config_of(config, weight, "mine", Owners()).select_top_k == 1
        assert gate_options.config_of(config, alone, "mine", Owners()).select_top_k == 2
        assert gate_options.config_of(config, alone, "first.weight", Owners()).select_top_k == 2
        plain = SereConfig(select_top_k=3)
        assert gate_options.config_of(plain, weight, "mine", None) is plain


def test_only_patterns_that_match_nothing_are_told(caplog):
    config = SereConfig(per_gate={"layers.0.*": {"select_top_k": 1}, "lairs.*": {"select_top_k": 2}})
    with caplog.at_level(logging.WARNING):
        gate_options.tell_unknown(config, ["layers.0.gate", "layers.1.gate"], "the model")
    [record] = caplog.records
    assert record.message == ("per_gate: no gate of the model matches 'lairs.*'; gates are named like layers.0.gate")
    with pytest.raises(ConfigError, match=r"matches 'lairs\.\*';"):
        gate_options.tell_unknown(config.replace(strict=True), ["layers.0.gate"], "the model")
