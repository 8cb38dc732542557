"""Active experts, counted in the graph, are the oracle's."""

import pytest
import torch

import sere_compile
from sere_compile import sere_backend
from sere_compile.similarity import binding
from sere_compile.testing import oracle_routing

from .compiled import logits
from .tiny_models import EAGER_SLOW, build, gate_names, random_profile, tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class TestStatistics:
    @pytest.mark.parametrize("experts", EAGER_SLOW)
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

    def test_a_reset_keeps_the_counters_where_they_are(self):
        """A recorded CUDA graph goes on adding to the same memory."""
        weight = torch.nn.Parameter(torch.zeros(4, 2))
        model = torch.nn.ParameterDict({"router": weight})
        counts = binding.name(weight, "router").counts_on(torch.device("cpu"))
        counts += 3
        sere_compile.reset_stats(model)
        assert binding.lookup(weight).counts is counts
        assert counts.tolist() == [0] * len(counts)
        counts += 1
        assert sere_compile.stats(model)["router"].calls == 1

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
