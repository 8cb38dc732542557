"""The backend end to end, on real transformers models, against an eager oracle that shares no code with it."""

import logging

import pytest
import torch

import sere_compile
from sere_compile import GateNotFoundError, sere_backend
from sere_compile.testing import oracle_routing

from .compiled import Broken, CountingInner, Dense, Skipped, logits, oracle_logits
from .tiny_models import MODELS, PAIRS, TOP_K, build, gate_names, random_profile, tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize(("name", "experts"), PAIRS)
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


class TestShapes:
    @pytest.mark.parametrize("dynamic", [pytest.param(None, marks=pytest.mark.slow), True])
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

    @pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
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

    @pytest.mark.slow
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

    @pytest.mark.parametrize("experts", ["batched_mm", pytest.param("eager", marks=pytest.mark.slow)])
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
        options = {"select_top_k": 1, "collect_stats": True, "inner": "eager"}
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
        assert "no experts are found behind its indices" in messages[0]
        assert "compiled.py" in messages[0]
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

    @pytest.mark.slow
    def test_moe_with_breaks_does_not_warn(self, caplog):
        """A model whose gates run behind a graph break is no false alarm."""
        model, ids = build("mixtral", "eager"), tokens()
        compiled = torch.compile(model, backend="sere", options={"inner": "eager"})
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                logits(compiled, ids)
        assert not any("found no MoE gate" in r.message for r in caplog.records)


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
