"""The streaming similarity metrics against plain computations on all outputs at once."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere_compile.errors import ConfigError, ProbeError
from sere_compile.experts.metrics import (
    METRICS,
    CkaAccumulator,
    CosineAccumulator,
    FrobeniusAccumulator,
    make_accumulator,
)

E, N, H = 6, 40, 5


def random_outputs(seed=0, experts=E, tokens=N, hidden=H, dtype=torch.float32):
    """Outputs with a shared part, so that similarities are spread, and a mean, so that centring matters."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(1, tokens, hidden, generator=generator)
    own = torch.randn(experts, tokens, hidden, generator=generator)
    strength = torch.linspace(0.1, 2.0, experts)[:, None, None]
    return (shared + strength * own + 0.5).to(dtype)


def frobenius_oracle(outputs):
    flat = outputs.double().flatten(1)
    distance = torch.stack([(flat - row).norm(dim=1) for row in flat])
    return 1 - distance / distance.max()


def cosine_oracle(outputs):
    x = outputs.double()
    return torch.stack([torch.nn.functional.cosine_similarity(x, row[None], dim=-1).mean(1) for row in x])


def kernel_oracle(x, kernel, bandwidth=0.8):
    """K [n, n] of one expert's [n, H], straight from the definitions."""
    if kernel == "linear":
        return x @ x.T
    if kernel == "polynomial":
        return (x @ x.T + 1) ** 3
    distances = torch.nn.functional.pdist(x)
    return torch.exp(-(torch.cdist(x, x) ** 2) / (2 * (bandwidth * distances.median()) ** 2))


def hsic_oracle(outputs, kernel):
    """Biased HSIC of every pair, [E, E], with the centring matrix written out."""
    n = outputs.shape[1]
    centring = torch.eye(n, dtype=torch.float64) - 1 / n
    centred = [kernel_oracle(x, kernel) @ centring for x in outputs.double()]
    # tr(A B) is the sum of A * B^T.
    traces = [[(a * b.T).sum() for b in centred] for a in centred]
    return torch.tensor(traces, dtype=torch.float64) / (n - 1) ** 2


def cka_oracle(hsic):
    return hsic / (hsic.diagonal()[:, None] * hsic.diagonal()).sqrt()


ORACLES = {
    "frobenius": frobenius_oracle,
    "cosine": cosine_oracle,
    "cka": lambda x: cka_oracle(hsic_oracle(x, "linear")),
    "cka_rbf": lambda x: cka_oracle(hsic_oracle(x, "rbf")),
    "cka_polynomial": lambda x: cka_oracle(hsic_oracle(x, "polynomial")),
}


def fed(accumulator, *batches):
    for batch in batches:
        accumulator.update(batch)
    return accumulator


def assert_similarity(actual, expected):
    torch.testing.assert_close(actual, expected.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("method", METRICS)
def test_one_batch_equals_the_plain_computation(method, seed, dtype):
    """On a single batch every metric is its textbook formula, for every float dtype of the outputs."""
    outputs = random_outputs(seed, dtype=dtype)
    actual = fed(make_accumulator(method, E), outputs).similarity()
    assert actual.dtype == torch.float32
    assert_similarity(actual, ORACLES[method](outputs))


@pytest.mark.parametrize("method", METRICS)
def test_every_metric_is_exactly_symmetric_with_ones_on_the_diagonal(method):
    """What a SimilarityProfile demands holds exactly, not up to rounding, and values stay in range."""
    actual = fed(make_accumulator(method, 33), random_outputs(3, experts=33)).similarity()
    assert torch.equal(actual, actual.T)
    assert torch.equal(actual.diagonal(), torch.ones(33))
    assert actual.min() >= (-1 if method == "cosine" else 0)
    assert actual.max() <= 1
    assert actual.unique().numel() > 33


@pytest.mark.parametrize("kind", [FrobeniusAccumulator, CosineAccumulator])
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, N), max_size=4), max_elements=st.integers(1, 400))
def test_batches_and_chunks_do_not_change_the_result(kind, cuts, max_elements):
    """However the tokens are cut into updates, and updates into chunks, the result is that of all at once."""
    outputs = random_outputs(4)
    edges = [0, *sorted(cuts), N]
    batches = [outputs[:, a:b] for a, b in itertools.pairwise(edges)]
    oracle = frobenius_oracle if kind is FrobeniusAccumulator else cosine_oracle
    accumulator = fed(kind(E, max_elements=max_elements), *batches)
    assert accumulator.num_tokens == N
    assert_similarity(accumulator.similarity(), oracle(outputs))


@pytest.mark.parametrize("max_elements", [1, E * N * 7, E * N * N])
@pytest.mark.parametrize("kernel", CkaAccumulator.KERNELS)
def test_cka_does_not_depend_on_the_block_of_kernel_rows(kernel, max_elements):
    """Rows of the kernel matrices are taken in blocks to bound memory; the last one may be short."""
    outputs = random_outputs(5)
    actual = fed(CkaAccumulator(E, kernel, max_elements=max_elements), outputs).similarity()
    assert_similarity(actual, cka_oracle(hsic_oracle(outputs, kernel)))


def test_the_float64_temporary_is_bounded():
    """No chunk is larger than `max_elements`, as long as one token of all experts fits."""
    chunks = list(FrobeniusAccumulator(E, max_elements=100)._chunks(random_outputs()))
    assert max(chunk.numel() for chunk in chunks) <= 100
    assert torch.equal(torch.cat(chunks, dim=1), random_outputs())


@pytest.mark.parametrize("kernel", CkaAccumulator.KERNELS)
def test_minibatch_cka_sums_hsic_before_dividing(kernel):
    """The estimate is the ratio of token-weighted sums of HSIC, not a mean of the batches' CKA."""
    batches = random_outputs(6, tokens=30).split([20, 10], dim=1)
    hsic = sum(batch.shape[1] * hsic_oracle(batch, kernel) for batch in batches)
    actual = fed(CkaAccumulator(E, kernel), *batches).similarity()
    assert_similarity(actual, cka_oracle(hsic))
    mean_of_ratios = sum(cka_oracle(hsic_oracle(batch, kernel)) for batch in batches) / 2
    assert (actual - mean_of_ratios).abs().max() > 1e-3


def test_minibatch_cka_comes_close_to_the_full_one():
    """With batches much larger than the hidden width the estimator agrees with CKA over all tokens."""
    outputs = random_outputs(7, tokens=600, hidden=3)
    actual = fed(CkaAccumulator(E), *outputs.split(150, dim=1)).similarity()
    torch.testing.assert_close(actual, cka_oracle(hsic_oracle(outputs, "linear")).float(), rtol=0, atol=0.02)


def test_linear_cka_ignores_rotation_scale_and_shift_of_an_expert():
    """The invariances that define linear CKA (Kornblith et al.): twins up to those are fully similar."""
    outputs = random_outputs(8)
    rotation, _ = torch.linalg.qr(torch.randn(H, H, generator=torch.Generator().manual_seed(0)))
    outputs[1] = 3 * outputs[0] @ rotation + 10
    assert fed(CkaAccumulator(E), outputs).similarity()[0, 1] == pytest.approx(1, abs=1e-6)


def test_rbf_bandwidth_is_a_fraction_of_the_median_distance():
    """Scaling an expert's outputs scales its bandwidth with them, and `bandwidth` takes effect."""
    outputs = random_outputs(9)
    scaled = outputs * torch.logspace(-3, 3, E)[:, None, None]
    plain = fed(CkaAccumulator(E, "rbf"), outputs).similarity()
    assert_similarity(fed(CkaAccumulator(E, "rbf"), scaled).similarity(), plain)
    assert (fed(CkaAccumulator(E, "rbf", bandwidth=0.3), outputs).similarity() - plain).abs().max() > 0.01


def test_rbf_survives_a_median_distance_of_zero():
    """An expert that gives zeros for most tokens has median distance 0; the kernel becomes equality."""
    outputs = random_outputs(10)
    outputs[2, : N - 5] = 0
    outputs[3] = outputs[2]
    actual = fed(CkaAccumulator(E, "rbf"), outputs).similarity()
    assert actual.isfinite().all()
    assert actual[2, 3] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kernel", CkaAccumulator.KERNELS)
@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4])
def test_cka_of_an_expert_that_never_varies_is_zero(kernel, constant):
    """Centring a constant leaves rounding noise, which must not be divided by itself."""
    outputs = random_outputs(11)
    outputs[2:4] = constant
    actual = fed(CkaAccumulator(E, kernel), outputs).similarity()
    others = torch.tensor([0, 1, 4, 5])
    assert torch.equal(actual[2, others], torch.zeros(4))
    assert actual[2, 3] == 0
    assert (actual[others][:, others] > 0).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_equal_experts_are_all_similar(scale):
    """Rounding in the Gram matrix must not be scaled up to a spread of similarities."""
    one = random_outputs(12, experts=1, tokens=301, hidden=37) * scale
    accumulator = fed(FrobeniusAccumulator(9, max_elements=1000), *one.expand(9, -1, -1).split(50, dim=1))
    assert torch.equal(accumulator.similarity(), torch.ones(9, 9))


def test_differences_below_the_rounding_of_the_gram_matrix_count_as_none():
    """At 1e-8 of the outputs, squared distances are rounding only, of either sign."""
    outputs = random_outputs(12, dtype=torch.float64)
    accumulator = fed(FrobeniusAccumulator(E), outputs[:1] + 1e-8 * outputs)
    assert torch.equal(accumulator.similarity(), torch.ones(E, E))


def test_nearly_equal_experts_keep_their_order():
    """Differences of 1e-4 of the outputs, as between upcycled experts, are resolved to 1e-5."""
    outputs = random_outputs(13, dtype=torch.float64)
    outputs = outputs[:1] + 1e-4 * outputs
    assert_similarity(fed(FrobeniusAccumulator(E), outputs).similarity(), frobenius_oracle(outputs))


@pytest.mark.parametrize("method", METRICS)
def test_a_single_expert_is_similar_to_itself(method):
    """E = 1 has no other expert to be scaled by."""
    outputs = random_outputs(14, experts=1)
    assert fed(make_accumulator(method, 1), outputs).similarity().tolist() == [[1.0]]


def test_zero_vectors_count_as_cosine_zero():
    """A token for which one expert gives nothing lowers its mean cosine, instead of making it NaN."""
    outputs = torch.ones(2, 4, H)
    outputs[1, 0] = 0
    assert fed(CosineAccumulator(2), outputs).similarity().tolist() == [[1, 0.75], [0.75, 1]]


def test_cosine_of_tiny_outputs_does_not_vanish():
    """The squares of 1e-200 underflow even in float64."""
    outputs = random_outputs(15, dtype=torch.float64)
    actual = fed(CosineAccumulator(E), outputs * 1e-200).similarity()
    assert_similarity(actual, cosine_oracle(outputs))


def test_projection_is_the_least_squares_coefficient():
    """a[u, v] minimises |A_u - a A_v|, which differs from a[v, u]; the diagonal is one."""
    outputs = random_outputs(16)
    flat = outputs.double().flatten(1)
    expected = torch.stack(
        [torch.stack([torch.linalg.lstsq(v[:, None], u[:, None]).solution[0, 0] for v in flat]) for u in flat]
    )
    actual = fed(FrobeniusAccumulator(E), *outputs.split(7, dim=1)).projection()
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)
    assert (actual - actual.T).abs().max() > 0.1


def test_projection_onto_a_dead_expert_is_zero():
    """Nothing can be expressed by an expert that always gives zero; 0 / 0 must not become NaN."""
    outputs = random_outputs(17)
    outputs[4] = 0
    actual = fed(FrobeniusAccumulator(E), outputs).projection()
    assert torch.equal(actual[:, 4], torch.zeros(E))
    assert torch.equal(actual[4], torch.zeros(E))
    assert actual.isfinite().all()


@pytest.mark.parametrize("method", METRICS)
def test_no_data_is_an_error(method):
    """A similarity without outputs, or from empty batches only, is refused instead of invented."""
    accumulator = make_accumulator(method, E)
    accumulator.update(torch.zeros(E, 0, H))
    with pytest.raises(ProbeError, match=r"seen no .*update\(\)"):
        accumulator.similarity()


def test_projection_without_data_is_an_error():
    """`projection` needs outputs as `similarity` does."""
    with pytest.raises(ProbeError, match="seen no expert outputs"):
        FrobeniusAccumulator(E).projection()


def test_cka_of_one_token_is_an_error_but_a_last_short_batch_is_not():
    """A batch of one token has no variance: it adds nothing, and alone it is no data."""
    outputs = random_outputs(18)
    accumulator = fed(CkaAccumulator(E), outputs[:, :1])
    with pytest.raises(ProbeError, match="two or more tokens"):
        accumulator.similarity()
    accumulator.update(outputs[:, 1:])
    assert_similarity(accumulator.similarity(), ORACLES["cka"](outputs[:, 1:]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", METRICS)
def test_non_finite_outputs_name_their_experts_and_add_nothing(method, value):
    """One bad batch is refused with the experts at fault and leaves what was summed before as it was."""
    good, bad = random_outputs(19), random_outputs(20)
    accumulator = fed(make_accumulator(method, E), good)
    bad[2, 3, 1] = bad[5, 0, 0] = value
    with pytest.raises(ProbeError, match=r"expert 2, 5 \(of 6\) hold NaN or infinity"):
        accumulator.update(bad)
    assert accumulator.num_tokens == N
    assert_similarity(accumulator.similarity(), ORACLES[method](good))


def test_large_half_precision_outputs_are_no_overflow():
    """fp16 outputs near the dtype's maximum are finite, though their sum or square is not in fp16."""
    outputs = (random_outputs(21).sign() * 6e4).to(torch.float16)
    assert_similarity(fed(FrobeniusAccumulator(E), outputs).similarity(), frobenius_oracle(outputs))


@pytest.mark.parametrize("method", ["frobenius", "cka", "cka_polynomial"])
def test_overflow_of_float64_is_an_error(method):
    """Sums that overflow are reported; infinities looked like equal experts, or like constant ones."""
    outputs = random_outputs(22, dtype=torch.float64) * 1e200
    with pytest.raises(ProbeError, match="overflow float64"):
        fed(make_accumulator(method, E), outputs).similarity()


@pytest.mark.parametrize("shape", [(E + 1, N, H), (N, H), (E, N, H, 1), (E, N, 0)])
@pytest.mark.parametrize("method", METRICS)
def test_outputs_of_another_shape_are_an_error(method, shape):
    """The message shows the expected and the given shape."""
    with pytest.raises(ProbeError, match=r"\[6, tokens, hidden\], got \(") as caught:
        make_accumulator(method, E).update(torch.zeros(shape))
    assert str(shape) in str(caught.value)


def test_integer_outputs_are_an_error():
    """Integers are a sign that ids were passed instead of outputs."""
    with pytest.raises(ProbeError, match=r"floating-point expert outputs, got torch\.int64"):
        FrobeniusAccumulator(E).update(torch.zeros(E, N, H, dtype=torch.long))


@pytest.mark.parametrize("method", METRICS)
def test_updates_keep_no_graph_and_no_outputs(method):
    """Outputs that require grad do not make the accumulator hold the model's activations alive."""
    outputs = random_outputs(23).requires_grad_()
    accumulator = fed(make_accumulator(method, E), outputs)
    assert not accumulator.similarity().requires_grad
    state = [value for value in vars(accumulator).values() if isinstance(value, torch.Tensor)]
    assert [tuple(value.shape) for value in state] == [(E, E)]


@pytest.mark.parametrize("method", METRICS)
def test_inference_mode_may_be_entered_and_left_between_updates(method):
    """Inference tensors forbid in-place updates outside of inference mode; the accumulator needs none."""
    outputs = random_outputs(24)
    first, second = outputs.split(N // 2, dim=1)
    accumulator = make_accumulator(method, E)
    with torch.inference_mode():
        accumulator.update(first)
    accumulator.update(second)
    assert_similarity(accumulator.similarity(), fed(make_accumulator(method, E), first, second).similarity())


def test_similarity_does_not_end_the_accumulation():
    """Reading the matrix in between changes nothing: a caller may watch it converge."""
    outputs = random_outputs(25)
    first, second = outputs.split(N // 2, dim=1)
    accumulator = fed(FrobeniusAccumulator(E), first)
    accumulator.similarity().zero_()
    accumulator.update(second)
    assert_similarity(accumulator.similarity(), frobenius_oracle(outputs))


def test_unknown_metric_names_the_nearest():
    """A misspelt method is answered with the likely one and the list."""
    with pytest.raises(ConfigError, match="unknown similarity method 'frobenious'; did you mean 'frobenius'"):
        make_accumulator("frobenious", E)
    with pytest.raises(ConfigError, match="frobenius, cosine, cka, cka_rbf, cka_polynomial"):
        make_accumulator("?", E)


def test_unknown_kernel_names_the_nearest():
    """A misspelt CKA kernel likewise."""
    with pytest.raises(ConfigError, match="unknown CKA kernel 'poly'; did you mean 'polynomial'"):
        CkaAccumulator(E, kernel="poly")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FrobeniusAccumulator(0), "num_experts must be at least 1, got 0"),
        (lambda: CosineAccumulator(E, max_elements=0), "max_elements must be at least 1, got 0"),
        (lambda: CkaAccumulator(-1), "num_experts must be at least 1, got -1"),
        (lambda: CkaAccumulator(E, bandwidth=0.0), r"bandwidth must be positive, got 0\.0"),
    ],
)
def test_options_out_of_range_are_errors(make, message):
    """Each numeric option says its bound and what it got."""
    with pytest.raises(ConfigError, match=message):
        make()
