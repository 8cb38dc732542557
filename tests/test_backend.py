"""The backend end to end, on real transformers models, against an eager oracle that shares no code with it."""

import copy
import logging
import sys
import threading

import pytest
import torch
from torch import nn

import sere_compile
from sere_compile import ConfigError, GateNotFoundError, ProfileError, SereConfig, sere_backend
from sere_compile.testing import oracle_routing

from .tiny_models import IMPLEMENTATIONS, MODELS, TOP_K, build, gate_names, random_profile, tokens


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def oracle_logits(model, profile, ids, select_top_k, **options):
    with oracle_routing(model, profile, select_top_k, **options):
        return logits(model, ids)


@pytest.mark.parametrize("experts", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MODELS)
class TestModels:
    def test_s_equal_k_changes_no_bit(self, name, experts, device):
        """With S = K the compiled model equals the original bit for bit.

        The inner compiler "eager" rules fusion out, the options our kernels on a GPU, which round in another order. The
        original is traced too: transformers takes other attention and grouped_mm kernels under Dynamo on CUDA.
        """
        model, ids = build(name, experts, device=device), tokens(device=device)
        expected = logits(torch.compile(model, backend="eager"), ids)
        if device == "cpu":
            assert torch.equal(expected, logits(model, ids))
        exact = sere_backend.with_options(
            select_top_k=TOP_K[name], inner="eager", fuse_router=False, lower_experts=False
        )
        assert torch.equal(logits(torch.compile(model, backend=exact), ids), expected)

    def test_s_below_k_equals_the_oracle(self, name, experts, device):
        """With S < K logits equal those of an eager model whose routers return re-routed ids."""
        model, ids = build(name, experts, device=device), tokens(device=device)
        profile = random_profile(model)
        expected = oracle_logits(model, profile, ids, 1)
        unchanged = logits(model, ids)
        sere_compile.attach(model, profile)
        # Inductor takes half a minute a model on a CPU: it runs for one experts implementation, on CUDA for all.
        inner = "inductor" if device == "cuda" or experts == "batched_mm" else "eager"
        compiled = torch.compile(model, backend="sere", options={"select_top_k": 1, "inner": inner})
        got = logits(compiled, ids)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(unchanged, expected, rtol=1e-3, atol=1e-3), "the case re-routes nothing"

    def test_every_gate_is_found(self, name, experts, device):
        """`explain` names one rewritten gate a layer, also where one graph serves all layers."""
        model = build(name, experts, device=device)
        report = sere_compile.explain(model, tokens(device=device), use_cache=False)
        assert [row.name for row in report.rewritten] == gate_names()
        assert all(row.top_k == TOP_K[name] and row.scoring == "softmax" for row in report.rewritten)


class TestVerification:
    """strict=True runs each gate at compile time, as traced and re-routed."""

    @pytest.mark.parametrize("experts", IMPLEMENTATIONS)
    @pytest.mark.parametrize("name", MODELS)
    def test_right_rewrites_are_proven(self, name, experts):
        """Every experts implementation passes, and computes what it computes without the proof."""
        model, ids = build(name, experts), tokens()
        sere_compile.attach(model, random_profile(model))
        results = []
        for strict in (True, False):
            torch._dynamo.reset()
            backend = sere_backend.with_options(select_top_k=1, inner="eager", strict=strict)
            results.append(logits(torch.compile(model, backend=backend), ids))
        assert torch.equal(*results)

    @pytest.mark.parametrize("experts", IMPLEMENTATIONS)
    def test_report_says_what_was_proven(self, experts):
        """Inside a graph the sum over slots; of a loop outside it what leaves, and the experts run for themselves."""
        config = SereConfig(select_top_k=1, strict=True)
        report = sere_compile.explain(build("qwen3_moe", experts), tokens(), use_cache=False, config=config)
        outside = "what the traced code makes of merged ids and weights; the experts outside the graph sum them"
        assert {row.proof for row in report.rewritten} == {outside if experts == "eager" else "the sum over slots"}
        assert "proven" in str(report)

    def test_experts_outside_that_do_not_sum_are_refused(self, monkeypatch):
        """An experts module that forgets a token's last slot: a report row, and an error in a compiled model."""
        model, ids = build("qwen3_moe", "eager"), tokens()
        experts = type(model.model.layers[0].mlp.experts)
        forward = experts.forward
        monkeypatch.setattr(
            experts,
            "forward",
            lambda self, hidden_states, top_k_index, top_k_weights: forward(
                self, hidden_states, top_k_index[:, :-1], top_k_weights[:, :-1]
            ),
        )
        report = sere_compile.explain(model, ids, use_cache=False, config=SereConfig(select_top_k=1, strict=True))
        assert {row.status for row in report} == {"skipped"}
        assert "from the sum over experts" in report.rows[0].reason
        compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner="eager", strict=True))
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="from the sum over experts"):
            logits(compiled, ids)

    def test_a_wrong_rule_is_refused(self, monkeypatch):
        """A dispatch that loses a slot is taken for one that sums both, as a wrong rule would have it."""
        from .passes.moe_modules import ScatterCombine, rows, similarity

        monkeypatch.setattr("sere_compile.passes.gate.UseKind.sums_duplicates", property(lambda kind: True))
        block = ScatterCombine()
        matrix = similarity()
        sere_compile.attach(block, sere_compile.SimilarityProfile({"router": (matrix + matrix.T) / 2}))
        options = {"select_top_k": 1, "inner": "eager", "strict": True}
        with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="from the sum over slots"):
            torch.compile(block, backend="sere", options=options)(rows())


class TestBinding:
    def test_one_graph_serves_layers_with_a_matrix_each(self):
        """Layers compiled one by one share one graph, and each still gets its own matrix."""
        model, ids = build("qwen3_moe"), tokens()
        profile = random_profile(model)
        expected = oracle_logits(model, profile, ids, 1)
        swapped = dict(zip(profile, reversed(list(profile.values())), strict=True))
        assert not torch.allclose(expected, oracle_logits(model, swapped, ids, 1), atol=1e-4), "layers look alike"
        sere_compile.attach(model, profile)
        counter = CountingInner()
        for layer in model.model.layers:
            layer.compile(backend=sere_backend.with_options(select_top_k=1, inner=counter))
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)
        assert counter.graphs == 1

    def test_an_identity_gate_never_looks_for_its_owner(self, monkeypatch):
        """S = K: the search through all live objects does not run, however often layers take turns in one graph."""
        model, ids = build("qwen3_moe"), tokens()
        searched = []
        monkeypatch.setattr("sere_compile.experts.owner.live_modules", lambda: searched.append(1) or [])
        for layer in model.model.layers:
            layer.compile(backend=sere_backend.with_options(select_top_k=TOP_K["qwen3_moe"], inner="eager"))
        for _ in range(2):
            logits(model, ids)
        assert searched == []

    @pytest.mark.parametrize("change", ["deepcopy", "load_state_dict"])
    def test_profile_follows_the_model(self, change):
        """A copy of the model, and weights assigned to it after attaching, have the profile; nothing is probed."""
        model, ids = build("mixtral"), tokens()
        profile = random_profile(model)
        expected = oracle_logits(model, profile, ids, 1)
        sere_compile.attach(model, profile)
        if change == "deepcopy":
            model = copy.deepcopy(model)
        else:
            model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner="eager"))
        torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_default_dtype_does_not_matter(self, dtype):
        """The matrix is float32 to the inner compiler whatever torch's default dtype is."""
        model, ids = build("mixtral"), tokens()
        profile = random_profile(model)
        expected = oracle_logits(model, profile, ids, 1)
        sere_compile.attach(model, profile)
        seen = []

        def inner(graph, inputs):
            seen.extend(n for n in graph.graph.find_nodes(op="placeholder") if "sere_similarity" in n.name)
            return graph.forward

        torch.set_default_dtype(dtype)
        try:
            compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner=inner))
            got = logits(compiled, ids)
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert [node.meta["example_value"].dtype for node in seen] == [torch.float32] * 2

    def test_threads_share_a_graph(self):
        """Threads that run different layers through one graph get each its own layer's matrix."""
        model = build("qwen3_moe", "batched_mm")
        profile = random_profile(model)
        sere_compile.attach(model, profile)
        blocks = [layer.mlp for layer in model.model.layers]
        backend = sere_compile.SereBackend(SereConfig(select_top_k=1, inner="eager"))
        bound = []
        original = sere_compile.backend.BoundGraph

        class Kept(original):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                bound.append(self)

        sere_compile.backend.BoundGraph = Kept
        try:
            for block in blocks:
                block.compile(backend=backend)
                with torch.no_grad():
                    block(torch.randn(4, 2, 32))
        finally:
            sere_compile.backend.BoundGraph = original
        [graph] = bound
        weights = [block.gate.weight for block in blocks]
        expected = [profile[name] for name in gate_names()]
        position = graph._plans[0].position
        wrong = []

        def run(index):
            arguments = [None] * position + [weights[index]]
            for _ in range(2000):
                if not torch.equal(graph.bind(arguments)[0], expected[index]):
                    wrong.append(index)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert not wrong

    def test_attaching_another_profile_needs_no_recompile(self):
        """A compiled model uses the profile that is attached now."""
        model, ids = build("mixtral"), tokens()
        counter = CountingInner()
        compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner=counter))
        for seed in (1, 2):
            profile = random_profile(model, seed)
            sere_compile.attach(model, profile)
            expected = oracle_logits(model, profile, ids, 1)
            torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-5, atol=1e-5)
        assert counter.graphs == 1

    def test_profile_that_lacks_a_gate_is_an_error(self):
        """A model with a profile never falls back to probing for the gates the profile lacks."""
        model, ids = build("mixtral"), tokens()
        model._sere_profile = sere_compile.SimilarityProfile({gate_names()[0]: torch.ones(8, 8)})
        compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner="eager"))
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"no matrix for the gate model\.layers\.1"):
            logits(compiled, ids)

    @pytest.mark.parametrize("experts", IMPLEMENTATIONS)
    def test_probing_measures_the_experts(self, experts, caplog):
        """With nothing attached, twins are found by probing and the log says so once."""
        model, ids = build("mixtral", experts), tokens()
        twins = (3, 5)
        with torch.no_grad():
            for layer in model.model.layers:
                for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                    weight[twins[1]] = weight[twins[0]]
        sere_compile.compiler.gate_matrices.warn_of_probing.reset()
        compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner="eager"))
        with caplog.at_level(logging.WARNING):
            logits(compiled, ids)
        assert sum("experts are probed" in record.message for record in caplog.records) == 1
        for gate in gate_names():
            entry = sere_compile.similarity.binding.lookup(model.get_parameter(gate))
            matrix = entry.matrix.clone().fill_diagonal_(-1)
            assert entry.name == gate
            assert matrix[twins].item() == pytest.approx(1.0, abs=1e-3)
            assert matrix.argmax().item() in (3 * 8 + 5, 5 * 8 + 3)

    def test_probing_a_block_compiled_alone(self):
        """A compiled MoE block, whose hidden states are an input of its graph, measures what the model does."""
        matrices = []
        for alone in (False, True):
            torch._dynamo.reset()
            model = build("mixtral")
            backend = sere_backend.with_options(select_top_k=1, inner="eager")
            if alone:
                for layer in model.model.layers:
                    layer.mlp.compile(backend=backend)
                logits(model, tokens())
            else:
                logits(torch.compile(model, backend=backend), tokens())
            matrices.append(sere_compile.similarity.binding.lookup(model.get_parameter(gate_names()[1])).matrix)
        torch.testing.assert_close(matrices[1], matrices[0], rtol=1e-4, atol=1e-5)

    def test_probing_agrees_between_implementations(self):
        """The traced dispatch region and the experts module give the same matrix."""
        matrices = []
        for experts in IMPLEMENTATIONS:
            torch._dynamo.reset()
            model = build("qwen3_moe", experts)
            compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner="eager"))
            logits(compiled, tokens())
            matrices.append(sere_compile.similarity.binding.lookup(model.get_parameter(gate_names()[1])).matrix)
        torch.testing.assert_close(matrices[1], matrices[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(matrices[2], matrices[0], rtol=1e-4, atol=1e-5)


class Unweighted(nn.Module):
    """Experts summed without routing weights over a mask: re-routing would have nothing to merge duplicates in."""

    def __init__(self, hidden=6, experts=5):
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.Parameter(torch.randn(experts, hidden, hidden))

    def forward(self, x):
        scores = self.router(x)
        mask = torch.zeros_like(scores).scatter(1, scores.topk(3).indices, 1.0)
        return torch.einsum("te,th,ehd->td", mask, x, self.experts)


class TestRefusedGate:
    def test_is_left_alone_with_a_warning(self, caplog):
        """A gate that cannot be re-routed safely is named with the reason, and computes what it did."""
        model, x = Unweighted(), torch.randn(8, 6)
        with caplog.at_level(logging.WARNING), torch.no_grad():
            got = torch.compile(model, backend="sere", options={"inner": "eager"})(x)
        assert torch.equal(got, model(x))
        [message] = [r.message for r in caplog.records if "not re-routed" in r.message]
        assert message.startswith("router.weight is not re-routed: its dispatch needs merged duplicates")

    def test_strict_raises(self):
        """strict=True does not let a refused gate pass."""
        compiled = torch.compile(Unweighted(), backend="sere", options={"inner": "eager", "strict": True})
        with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"router\.weight cannot be"):
            compiled(torch.randn(8, 6))


class CountingInner:
    """An inner backend that counts the graphs it compiles."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


class TestShapes:
    @pytest.mark.parametrize("dynamic", [None, True])
    def test_batch_and_length_change(self, dynamic):
        """Other batches and lengths are right, and compiling stops after the first dynamic graph."""
        model = build("qwen3_moe")
        profile = random_profile(model)
        sere_compile.attach(model, profile)
        counter = CountingInner()
        backend = sere_backend.with_options(select_top_k=1, inner=counter)
        compiled = torch.compile(model, backend=backend, dynamic=dynamic)
        for batch, length in [(4, 6), (3, 5), (5, 7), (2, 9), (7, 3)]:
            ids = tokens(batch, length, seed=batch)
            expected = oracle_logits(model, profile, ids, 1)
            torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-5, atol=1e-5)
        assert counter.graphs <= 2

    def test_batch_of_one_is_unchanged(self):
        """One token names K experts, all of which min_active = K keeps."""
        model, ids = build("qwen3_moe"), tokens(1, 1)
        expected = logits(model, ids)
        compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner="eager"))
        assert torch.equal(logits(compiled, ids), expected)

    def test_min_active_zero_lets_the_primary_set_collapse(self):
        """The paper's behaviour is one option away."""
        model, ids = build("qwen3_moe"), tokens(1, 1)
        profile = random_profile(model)
        sere_compile.attach(model, profile)
        expected = oracle_logits(model, profile, ids, 1, min_active=0)
        compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, min_active=0, inner="eager"))
        torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_max_tokens_leaves_prefill_alone(self, dynamic):
        """Forwards above max_tokens are the original bit for bit, those below re-route."""
        model = build("qwen3_moe")
        profile = random_profile(model)
        sere_compile.attach(model, profile)
        backend = sere_backend.with_options(select_top_k=1, max_tokens=8, inner="eager")
        compiled = torch.compile(model, backend=backend, dynamic=dynamic)
        large, small = tokens(4, 6), tokens(4, 2)
        assert torch.equal(logits(compiled, large), logits(model, large))
        expected = oracle_logits(model, profile, small, 1)
        torch.testing.assert_close(logits(compiled, small), expected, rtol=1e-5, atol=1e-5)


class TestModes:
    def test_threshold_reaches_the_operator(self):
        """Critical experts stay."""
        model, ids = build("qwen3_moe"), tokens()
        profile = random_profile(model)
        sere_compile.attach(model, profile)
        expected = oracle_logits(model, profile, ids, 1, threshold=0.8)
        assert not torch.allclose(expected, oracle_logits(model, profile, ids, 1), atol=1e-3)
        options = {"select_top_k": 1, "threshold": 0.8, "inner": "eager"}
        compiled = torch.compile(model, backend="sere", options=options)
        torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-5, atol=1e-5)

    def test_bfloat16(self):
        """A bf16 model re-routes the same ids as its bf16 oracle."""
        model, ids = build("qwen3_moe", "batched_mm", torch.bfloat16), tokens()
        profile = random_profile(model)
        sere_compile.attach(model, profile)
        expected = oracle_logits(model, profile, ids, 1)
        compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner="eager"))
        torch.testing.assert_close(logits(compiled, ids), expected, rtol=2e-2, atol=2e-2)

    def test_inference_mode(self):
        """Compiling under inference_mode and calling under no_grad afterwards both work."""
        model, ids = build("mixtral"), tokens()
        profile = random_profile(model)
        sere_compile.attach(model, profile)
        expected = oracle_logits(model, profile, ids, 1)
        compiled = torch.compile(model, backend="sere", options={"select_top_k": 1, "inner": "aot_eager"})
        with torch.inference_mode():
            inferred = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(inferred.clone(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("experts", ["batched_mm", "eager"])
    def test_gradients_equal_the_oracle(self, experts):
        """Training through re-routing gives the gradients of the re-routed eager model."""
        ids = tokens()
        model = build("mixtral", experts)
        profile = random_profile(model)
        with oracle_routing(model, profile, 1):
            model(ids, use_cache=False, labels=ids).loss.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        sere_compile.attach(model, profile)
        compiled = torch.compile(model, backend="sere", options={"select_top_k": 1, "inner": "aot_eager"})
        compiled(ids, use_cache=False, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)

    def test_generate_compiles_the_decode_step(self):
        """`generate` with a CompileConfig gives the tokens of the oracle, decoding re-routed and prefill not."""
        from transformers import CompileConfig

        model, ids = build("qwen3_moe"), tokens(4, 5)
        profile = random_profile(model)
        sere_compile.attach(model, profile)
        options = {"select_top_k": 1, "collect_stats": True}
        compile_config = CompileConfig(backend="sere", options=options, mode=None, fullgraph=False)
        compile_config._compile_all_devices = True
        settings = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
        mask = torch.ones_like(ids)
        got = model.generate(ids, attention_mask=mask, compile_config=compile_config, **settings)
        assert torch.equal(got, greedy(model, profile, ids, 5))
        counted = sere_compile.stats(model)[gate_names()[0]]
        # The first of five new tokens comes from the prefill, which generate runs eagerly.
        assert (counted.calls, counted.tokens) == (4, 16)


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def greedy(model, profile, ids, steps):
    """Greedy decoding by hand: the prompt eagerly as it is, each further step re-routed."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + steps)
    with torch.no_grad():
        token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        out = [ids, token]
        for _ in range(steps - 1):
            with oracle_routing(model, profile, 1):
                token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            out.append(token)
    return torch.cat(out, 1)


class TestOptions:
    def test_misspelt_option_names_the_nearest(self):
        """A misspelt option is an error, never ignored."""
        with pytest.raises(ConfigError, match="did you mean 'select_top_k'"):
            sere_backend.with_options(select_topk=2)
        compiled = torch.compile(build("mixtral"), backend="sere", options={"treshold": 0.2})
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="did you mean 'threshold'"):
            logits(compiled, tokens())

    def test_inductor_options_reach_inductor(self):
        """Options that are Inductor's go there, and to nothing else."""
        model, ids = build("mixtral"), tokens()
        options = {"select_top_k": 1, "epilogue_fusion": False}
        logits(torch.compile(model, backend="sere", options=options), ids)
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="unknown option 'epilogue_fusion'"):
            logits(torch.compile(model, backend="sere", options={**options, "inner": "eager"}), ids)

    def test_mode_goes_to_inductor_only(self):
        """`mode` with another inner compiler is an error."""
        model, ids = build("mixtral"), tokens()
        logits(torch.compile(model, backend=sere_backend, mode="max-autotune-no-cudagraphs"), ids)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=sere_backend.with_options(inner="eager"), mode="reduce-overhead")
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="takes no mode"):
            logits(compiled, ids)

    @pytest.mark.parametrize("inner", ["eager", "aot_eager", "cudagraphs", "inductor"])
    def test_inner_backends(self, inner):
        """Any registered backend can compile the rewritten graph."""
        model, ids = build("mixtral"), tokens()
        profile = random_profile(model)
        sere_compile.attach(model, profile)
        expected = oracle_logits(model, profile, ids, 1)
        compiled = torch.compile(model, backend="sere", options={"select_top_k": 1, "inner": inner})
        torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-5, atol=1e-5)

    def test_equal_options_do_not_recompile(self):
        """A backend made anew with equal options is the same backend to Dynamo."""
        model, ids = build("mixtral"), tokens()
        counter = CountingInner()
        for _ in range(2):
            backend = sere_backend.with_options(select_top_k=1, inner=counter)
            logits(torch.compile(model, backend=backend), ids)
        assert counter.graphs == 1
        assert sere_backend.with_options(threshold=0.1) != sere_backend
        assert hash(sere_backend.with_options(threshold=0.1)) == hash(sere_backend.with_options(threshold=0.1))

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("select_top_k", 0, "select_top_k must be None or an integer of at least 1, got 0"),
            ("select_top_k", 1.5, "select_top_k must be"),
            (
                "threshold",
                float("nan"),
                'threshold must be a finite number, or a share of experts such as "q0.2", got nan',
            ),
            ("threshold", "0.3", "threshold must be a finite number"),
            ("min_active", -1, "min_active must be None or an integer of at least 0"),
            ("max_tokens", 0, "max_tokens must be None or an integer of at least 1"),
            ("strict", 1, "strict must be True or False"),
            ("inner", 3, "inner must be the name of a backend or a callable"),
            ("inner", "sere", "would compile with itself"),
        ],
    )
    def test_bad_value(self, option, value, message):
        """Every option is checked where it is given."""
        with pytest.raises(ConfigError, match=message):
            SereConfig(**{option: value})

    def test_default_s(self):
        """The paper's recommendation: two, or one of two experts; one expert is left alone."""
        config = SereConfig()
        assert [config.resolved_top_k(k) for k in (1, 2, 3, 8)] == [1, 1, 2, 2]
        assert [config.resolved_min_active(k) for k in (2, 8)] == [2, 8]

    def test_a_budget_below_k(self):
        """It is kept where nothing else was asked for; asking for both is an error."""
        config = SereConfig(select_top_k="auto", max_active=4)
        assert [config.resolved_min_active(k) for k in (2, 8)] == [2, 4]
        with pytest.raises(ConfigError, match="min_active=8 allows no budget of max_active=4 experts"):
            config.replace(min_active=8)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 50)

    def forward(self, x):
        return torch.topk(self.head(x).softmax(-1), 3)


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        x = self.layer(x)
        torch._dynamo.graph_break()
        return self.layer(x)


class Skipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Dense()

    def forward(self, x):
        for _ in range(1):
            found = self.inner(x)
            torch._dynamo.graph_break()
        return found


class TestNothingFound:
    def test_warns_once_with_the_nearest_candidate(self, caplog):
        """A compile that meets no gate says so and names what came closest; the result is the model's own."""
        model, x = Dense(), torch.randn(4, 8)
        compiled = torch.compile(model, backend="sere", options={"inner": "eager"})
        with caplog.at_level(logging.WARNING):
            _, ids = compiled(x)
            compiled(x)
        messages = [r.message for r in caplog.records if "found no MoE gate" in r.message]
        assert len(messages) == 1
        assert "its indices reach no expert weights" in messages[0]
        assert "test_backend.py" in messages[0]
        assert torch.equal(ids, model(x)[1])

    def test_strict_raises(self):
        """strict=True turns the warning into an error."""
        compiled = torch.compile(Dense(), backend="sere", options={"inner": "eager", "strict": True})
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="found no MoE gate"):
            compiled(torch.randn(4, 8))

    def test_broken_callable_warns_at_its_second_call(self, caplog):
        """Where Dynamo breaks the callable, gates may still follow; the second call knows that none did."""
        compiled = torch.compile(Broken(), backend="sere", options={"inner": "eager"})
        with caplog.at_level(logging.WARNING):
            compiled(torch.randn(4, 8))
            assert not caplog.records
            compiled(torch.randn(4, 8))
            compiled(torch.randn(4, 8))
        assert sum("found no MoE gate" in r.message for r in caplog.records) == 1

    def test_callable_that_dynamo_skips_is_told_too(self, caplog):
        """A break inside a loop makes Dynamo skip the outer frame; only inner frames have graphs then."""
        compiled = torch.compile(Skipped(), backend="sere", options={"inner": "eager"})
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                compiled(torch.randn(4, 8))
        [message] = [r.message for r in caplog.records if "found no MoE gate" in r.message]
        assert "The nearest candidate is topk" in message

    def test_every_callable_is_told_apart(self, caplog):
        """A callable at the address of one that is gone is not taken for it."""
        from sere_compile.compiler.missing_gates import _calls

        compiled = torch.compile(Broken(), backend="sere", options={"inner": "eager"})
        with caplog.at_level(logging.WARNING):
            compiled(torch.randn(4, 8))
            for call in _calls.by_callable.values():
                call.function, call.settled = lambda: None, True  # the callable that was here before
            compiled(torch.randn(4, 8))
            compiled(torch.randn(4, 8))
        assert sum("found no MoE gate" in r.message for r in caplog.records) == 1

    def test_strict_broken_callable_raises_at_its_second_call(self):
        """The same with strict=True."""
        compiled = torch.compile(Broken(), backend="sere", options={"inner": "eager", "strict": True})
        compiled(torch.randn(4, 8))
        with pytest.raises(GateNotFoundError, match="no top-k selection at all"):
            compiled(torch.randn(4, 8))

    def test_moe_with_breaks_does_not_warn(self, caplog):
        """A model whose gates run behind a graph break is no false alarm."""
        model, ids = build("mixtral", "eager"), tokens()
        compiled = torch.compile(model, backend="sere", options={"inner": "eager"})
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                logits(compiled, ids)
        assert not any("found no MoE gate" in r.message for r in caplog.records)


class TestStatistics:
    @pytest.mark.parametrize("experts", IMPLEMENTATIONS)
    def test_counts_equal_the_oracle(self, experts):
        """Tokens, changed slots and active experts are counted for each layer of its own."""
        model, ids = build("qwen3_moe", experts), tokens()
        profile = random_profile(model)
        sere_compile.attach(model, profile)
        active = {}
        with oracle_routing(model, profile, 1, active=active):
            logits(model, ids)
        # AOTAutograd turns the in-place count into a functional one and writes it back.
        options = {"select_top_k": 1, "collect_stats": True, "inner": "aot_eager"}
        compiled = torch.compile(model, backend="sere", options=options)
        for _ in range(2):
            logits(compiled, ids)
        counted = sere_compile.stats(model)
        assert list(counted) == gate_names()
        for name, [(before, after)] in active.items():
            row = counted[name]
            assert (row.calls, row.tokens, row.slots) == (2, 48, 192)
            assert (row.mean_active_before, row.mean_active_after) == (before, after)
            assert 0 < row.slots_changed < row.slots
        sere_compile.reset_stats(model)
        assert sere_compile.stats(model)[gate_names()[0]].calls == 0

    @pytest.mark.parametrize("inner", ["eager", "aot_eager"])
    def test_a_block_that_runs_twice_counts_twice(self, inner):
        """Two gates of one graph that share a router weight share one counter, functionalised or not."""
        block = build("qwen3_moe", "batched_mm").model.layers[0].mlp
        backend = sere_backend.with_options(select_top_k=1, collect_stats=True, inner=inner)
        compiled = torch.compile(lambda x: block(block(x)), backend=backend)
        with torch.no_grad():
            for _ in range(3):
                compiled(torch.randn(4, 2, 32))
        [counted] = sere_compile.stats(block).values()
        assert (counted.calls, counted.tokens) == (6, 48)

    def test_without_counting_it_says_what_to_do(self):
        """Asking for statistics that nobody collected is an error."""
        with pytest.raises(sere_compile.SereError, match="collect_stats"):
            sere_compile.stats(build("mixtral"))


@pytest.mark.gpu
class TestCuda:
    @pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
    @pytest.mark.parametrize("name", MODELS)
    def test_cuda_graphs(self, name, experts):
        """mode="reduce-overhead" records and replays re-routing, with other tokens in every replay."""
        # transformers' grouped_mm waits for the device with anything but bf16, which no CUDA graph can record.
        bf16 = experts == "grouped_mm"
        dtype, tolerance = (torch.bfloat16, 3e-2) if bf16 else (torch.float32, 1e-4)
        model = build(name, experts, dtype, device="cuda")
        profile = random_profile(model)
        sere_compile.attach(model, profile)
        # Logits in bf16 are equal now and then. Which of two equal experts comes first is torch.topk's affair on one
        # side and defined on the other; with S = 1 it decides who is primary, and so a whole batch.
        backend = sere_backend.with_options(select_top_k=1, collect_stats=not bf16, fuse_router=not bf16)
        compiled = torch.compile(model, backend=backend, mode="reduce-overhead")
        active = {}
        for step in range(6):
            ids = tokens(8, 1, seed=step, device="cuda")
            with oracle_routing(model, profile, 1, active=active):
                expected = logits(model, ids)
            got = logits(compiled, ids)
            assert relative_error(got, expected) < tolerance
            assert relative_error(logits(model, ids), expected) > 3 * tolerance, "the case re-routes too little"
        if bf16:
            return  # rounding may tip a near tie of two experts and so an exact count
        for gate, counted in sere_compile.stats(model).items():
            before, after = (sum(column) for column in zip(*active[gate], strict=True))
            assert (counted.active_before, counted.active_after) == (before, after)

    def test_cuda_graphs_with_a_graph_for_all_layers(self):
        """Layers that share one compiled graph replay with a matrix each."""
        model = build("qwen3_moe", "batched_mm", device="cuda")
        profile = random_profile(model)
        sere_compile.attach(model, profile)
        for layer in model.model.layers:
            layer.compile(backend=sere_backend.with_options(select_top_k=1), mode="reduce-overhead")
        for step in range(6):
            ids = tokens(8, 1, seed=step, device="cuda")
            with oracle_routing(model, profile, 1):
                for layer in model.model.layers:
                    layer._compiled_call_impl, layer.kept = None, layer._compiled_call_impl
                expected = logits(model, ids)
                for layer in model.model.layers:
                    layer._compiled_call_impl = layer.kept
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)

    def test_generate(self):
        """`generate` with a static cache compiles re-routed decoding on its own."""
        from transformers import CompileConfig

        model, ids = build("qwen3_moe", "batched_mm", device="cuda"), tokens(4, 5, device="cuda")
        profile = random_profile(model)
        sere_compile.attach(model, profile)
        got = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            compile_config=CompileConfig(backend="sere", options={"select_top_k": 1}, mode=None, fullgraph=False),
            max_new_tokens=5,
            do_sample=False,
            cache_implementation="static",
            pad_token_id=0,
        )
        assert torch.equal(got, greedy(model, profile, ids, 5))


class TestExplain:
    def test_changes_nothing_and_probes_nothing(self):
        """`explain` runs the original model and measures no similarity."""
        model, ids = build("mixtral"), tokens()
        before = logits(model, ids)
        sere_compile.explain(model, ids, use_cache=False)
        assert sere_compile.similarity.binding.lookup(model.get_parameter(gate_names()[0])).matrix is None
        assert torch.equal(logits(model, ids), before)

    def test_identity_and_skips_have_reasons(self):
        """S = K is reported as identity; a selection that is no gate as skipped, with its line."""
        model, ids = build("mixtral"), tokens()
        report = sere_compile.explain(model, ids, use_cache=False, config=SereConfig(select_top_k=2))
        assert [row.status for row in report] == ["identity"] * 2
        dense = sere_compile.explain(Dense(), torch.randn(2, 8))
        assert "0 MoE gates found" in str(dense)
        assert "test_backend.py" in dense.rows[0].name
        assert dense.rows[0].status == "skipped"

    def test_leaves_the_recompile_limit_to_the_user(self):
        """Explaining many times does not use up the recompiles that the user's own compile is allowed."""
        model, ids = build("mixtral"), tokens()
        profile = random_profile(model)
        sere_compile.attach(model, profile)
        for _ in range(12):
            assert len(sere_compile.explain(model, ids, use_cache=False).rewritten) == 2
        compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner="eager"))
        expected = oracle_logits(model, profile, ids, 1)
        torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-5, atol=1e-5)

    def test_works_on_a_model_compiled_in_place(self):
        """`model.compile()` does not hide the model from `explain`, and stays in force afterwards."""
        model, ids = build("mixtral"), tokens()
        model.compile(backend=sere_backend.with_options(select_top_k=1, inner="eager"))
        logits(model, ids)
        assert len(sere_compile.explain(model, ids, use_cache=False).rewritten) == 2
        assert model._compiled_call_impl is not None

    def test_works_on_a_compiled_model(self):
        """A model that is compiled already is explained all the same."""
        model, ids = build("mixtral"), tokens()
        compiled = torch.compile(model, backend="sere", options={"select_top_k": 1, "inner": "eager"})
        logits(compiled, ids)
        assert len(sere_compile.explain(compiled, ids, use_cache=False).rewritten) == 2


def test_profile_error_is_a_value_error():
    """Callers may catch the built-in class."""
    assert issubclass(ProfileError, ValueError)
