"""Options: names, values, who gets them."""

import copy
import pickle

import pytest
import torch

import sere_compile
from sere_compile import ConfigError, SereConfig, sere_backend

from .compiled import CountingInner, logits, oracle_logits
from .thinned import thinned
from .tiny_models import build, random_profile, tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class TestOptions:
    def test_misspelt_option_names_the_nearest(self):
        """A misspelt option is an error, never ignored."""
        with pytest.raises(ConfigError, match="did you mean 'select_top_k'"):
            sere_backend.with_options(select_topk=2)
        compiled = torch.compile(build("mixtral"), backend="sere", options={"treshold": 0.2})
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="did you mean 'threshold'"):
            logits(compiled, tokens())

    @pytest.mark.slow
    def test_inductor_options_reach_inductor(self):
        """Options that are Inductor's go there, and to nothing else."""
        model, ids = build("mixtral"), tokens()
        options = {"select_top_k": 1, "epilogue_fusion": False}
        logits(torch.compile(model, backend="sere", options=options), ids)
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="unknown option 'epilogue_fusion'"):
            logits(torch.compile(model, backend="sere", options={**options, "inner": "eager"}), ids)

    @pytest.mark.slow
    def test_mode_goes_to_inductor_only(self):
        """`mode` with another inner compiler is an error."""
        model, ids = build("mixtral"), tokens()
        logits(torch.compile(model, backend=sere_backend, mode="max-autotune-no-cudagraphs"), ids)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=sere_backend.with_options(inner="eager"), mode="reduce-overhead")
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="takes no mode"):
            logits(compiled, ids)

    @pytest.mark.parametrize("inner", thinned(["eager", "aot_eager", "cudagraphs", "inductor"], (1,)))
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


def test_a_misspelt_option_of_the_constructor():
    """As with every other way to give options."""
    with pytest.raises(ConfigError, match="unknown option 'selecttopk'; did you mean 'select_top_k'"):
        SereConfig(selecttopk=2)
    config = SereConfig(select_top_k=2)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
