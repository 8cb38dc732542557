"""`sere::reroute_merged`: reference and kernel against the oracle, distinctness, weights, gradients."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sere_compile.ops import reroute, reroute_merged
from sere_compile.ops.reroute.reference import named_by_comparison
from sere_compile.ops.reroute_merged.reference import reroute_merged_reference

from ..thinned import thinned
from .cases import STRUCTURES, Structure, draw_case, poisoned_memory
from .oracle import as_fp32_rows, merge_rows, reroute_rows

OP = torch.ops.sere.reroute_merged.default

# The first and the last of these run into the exhausted active set often.
TYPICAL = [
    Structure(5, 5, 1, masked=True),
    Structure(60, 4, 2, torch.int32, masked=True, min_active=4),
    Structure(9, 6, 2),
]


def expected(case):
    rows, num_experts = case.flat("ids"), case.similarity.shape[0]
    new_rows = reroute_rows(
        rows, as_fp32_rows(case.similarity), case.select, case.threshold, case.min_active, case.flat("mask")
    )
    ids, weights = merge_rows(rows, new_rows, case.flat("weights"), num_experts, case.flat("mask"))
    return (
        torch.tensor(ids, dtype=case.ids.dtype).reshape(case.ids.shape),
        torch.tensor(weights, dtype=case.weights.dtype).reshape(case.ids.shape),
    )


def assert_is(result, want, case, rtol=1e-5):
    """Same ids; weights equal up to the order of at most K fp32 additions; contiguous, same dtypes."""
    ids, weights = result
    torch.testing.assert_close(ids.cpu(), want[0], rtol=0, atol=0)
    torch.testing.assert_close(weights.cpu(), want[1], rtol=rtol, atol=0)
    assert (ids.dtype, weights.dtype) == (case.ids.dtype, case.weights.dtype)
    assert ids.device == weights.device == case.ids.device
    assert ids.is_contiguous()
    assert weights.is_contiguous()


def call(case):
    return reroute_merged(case.ids, case.weights, case.similarity, *case.options)


def launch(case):
    from sere_compile.ops.reroute.kernel import LaunchConfig
    from sere_compile.ops.reroute_merged.kernel import launch_reroute_merged

    config = None if case.ids.is_cuda else LaunchConfig(slots=16, chunk=16, num_warps=4)
    with poisoned_memory():
        return launch_reroute_merged(case.ids, case.weights, case.similarity, *case.options, config)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_operator_equals_oracle(structure, device):
    """The operator (on CPU its ATen reference) does what the method's text says, on random inputs."""
    for seed in range(20):
        case = draw_case(structure, seed).to(device)
        assert_is(call(case), expected(case), case)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_reference_without_a_scatter_equals_oracle(structure, device):
    """As exporters use it."""
    for seed in range(40, 43):
        case = draw_case(structure, seed).to(device)
        arguments = (case.ids, case.weights, case.similarity, *case.options)
        assert_is(reroute_merged_reference(*arguments, named=named_by_comparison), expected(case), case)


KERNEL_STRUCTURES = [s for s in STRUCTURES if 0 < s.select < s.slots and s.slots <= 8][::2] + TYPICAL


@pytest.mark.parametrize("structure", thinned(KERNEL_STRUCTURES, range(0, len(KERNEL_STRUCTURES), 4)), ids=str)
def test_kernel_equals_oracle(structure, kernel_device):
    """The kernel merges, frees and fills exactly as the oracle, and writes every slot and nothing else."""
    for seed in range(100, 108):
        case = draw_case(structure, seed).to(kernel_device)
        assert_is(launch(case), expected(case), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weight_dtypes(dtype, device, kernel_device):
    """Sums are made in fp32 (fp64 for fp64) and come back in the dtype of the weights."""
    for seed in range(5):
        case = draw_case(TYPICAL[0], seed, 5).to(device)
        case.weights = case.weights.to(dtype)
        assert_is(call(case), expected(case), case)
        case = case.to(kernel_device)
        # Triton's interpreter truncates fp32 to bf16 and fp16 where a GPU rounds: one ulp.
        assert_is(launch(case), expected(case), case, rtol=2 * torch.finfo(dtype).eps)


def test_merging_by_hand():
    """The first slot gets the sum, freed slots the lowest active experts the token does not name."""
    similarity = torch.zeros(8, 8)
    similarity[4, 3] = similarity[5, 3] = 1.0
    ids = torch.tensor([[3, 4, 5], [1, 0, 6], [2, 4, 1]])
    weights = torch.tensor([[0.5, 0.25, 0.125], [0.5, 0.25, 0.125], [0.5, 0.25, 0.125]])
    # Primary 1 2 3; 4 and 5 go to 3, 0 and 6 to 1 (all zero: lowest). Active: 1 2 3.
    new_ids, new_weights = reroute_merged(ids, weights, similarity, 1)
    assert reroute(ids, similarity, 1).tolist() == [[3, 3, 3], [1, 1, 1], [2, 3, 1]]
    assert new_ids.tolist() == [[3, 1, 2], [1, 2, 3], [2, 3, 1]]
    assert new_weights.tolist() == [[0.875, 0, 0], [0.875, 0, 0], [0.5, 0.25, 0.125]]


def test_exhausted_active_set_when_the_own_expert_is_the_groups_expert(kernel_device):
    """Keeping the original id alone would name expert 1 twice: slot 1 was re-routed to it, slot 2 was it."""
    ids, weights = torch.tensor([[0, 5, 1, 2], [1, 0, 5, 2]]), torch.full((2, 4), 0.25)
    similarity = torch.zeros(6, 6)
    similarity[5, 1] = 1.0
    want = [[0, 1, 5, 2], [1, 0, 5, 2]]
    assert reroute(ids, similarity, 1).tolist() == [[0, 1, 1, 0], [1, 0, 1, 0]]
    new_ids, new_weights = reroute_merged(ids, weights, similarity, 1)
    assert new_ids.tolist() == want
    assert new_weights.tolist() == [[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]]
    case = draw_case(Structure(6, 4, 1), 0, 2)
    case.ids, case.weights, case.similarity, case.threshold = ids, weights, similarity, 0.0
    assert launch(case.to(kernel_device))[0].tolist() == want


def test_sentinels_are_not_merged():
    """Two equal sentinels of a token that changes keep id and weight."""
    ids, weights = torch.tensor([[0, -1, 3, -1], [1, 4, 4, 2]]), torch.full((2, 4), 0.25)
    new_ids, new_weights = reroute_merged(ids, weights, torch.ones(4, 4), 1)
    assert new_ids.tolist() == [[0, -1, 1, -1], [1, 4, 4, 0]]
    assert new_weights.tolist() == [[0.5, 0.25, 0, 0.25], [0.25, 0.25, 0.25, 0.25]]


def test_unchanged_token_keeps_every_bit(kernel_device):
    """No re-routing, no merging: NaN, -0.0 and even a duplicate that was there before stay."""
    ids = torch.tensor([[0, 0, 1], [1, 0, 0]])
    weights = torch.tensor([[float("nan"), -0.0, float("inf")], [-0.0, 1e-45, 0.1]])
    case = draw_case(Structure(4, 3, 1), 0, 2)
    case.ids, case.weights, case.threshold = ids, weights, 0.0
    for result in (call(case), launch(case.to(kernel_device))):
        assert result[0].cpu().equal(ids)
        assert result[1].cpu().view(torch.int32).equal(weights.view(torch.int32))


@st.composite
def cases(draw):
    slots = draw(st.integers(1, 6))
    experts = draw(st.integers(slots, 12))
    structure = Structure(
        experts, slots, draw(st.integers(-1, slots + 1)), masked=draw(st.booleans()),
        min_active=draw(st.integers(0, slots + 2)),
    )  # fmt: skip
    return draw_case(structure, draw(st.integers(0, 2**30)), draw(st.integers(0, 9)), distinct=True)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_properties(case):
    """Tokens with distinct ids come out distinct with the same total weight, spread over the same experts."""
    num_experts = case.similarity.shape[0]
    before = case.ids.clone(), case.weights.clone()
    ids, weights = call(case)
    assert case.ids.equal(before[0])
    assert case.weights.equal(before[1])
    if ids.numel():
        assert ids.untyped_storage().data_ptr() != case.ids.untyped_storage().data_ptr()
        assert weights.untyped_storage().data_ptr() != case.weights.untyped_storage().data_ptr()
    new_ids = reroute(case.ids, case.similarity, *case.options)
    rows = (x.reshape(-1, x.shape[-1]).tolist() for x in (case.ids, new_ids, ids, case.weights, weights))
    for old, new, merged, old_weights, new_weights in zip(*rows, strict=True):
        experts = [u for u in merged if 0 <= u < num_experts]
        assert len(set(experts)) == len(experts)
        assert sum(new_weights) == pytest.approx(sum(old_weights))
        if old == new:
            assert (merged, new_weights) == (old, old_weights)
        # What a sum over slots computes is the same as for the re-routed ids.
        dense, want = [0.0] * num_experts, [0.0] * num_experts
        for k in range(len(old)):
            if 0 <= new[k] < num_experts:
                want[new[k]] += old_weights[k]
                dense[merged[k]] += new_weights[k]
        assert dense == pytest.approx(want)


@pytest.mark.parametrize("structure", TYPICAL, ids=str)
def test_gradient(structure, device):
    """d weights[k] = d out[first slot of k's group], against finite differences."""
    for seed in range(3):
        case = draw_case(structure, seed, 3).to(device)
        weights = case.weights.double().requires_grad_()
        options = case.similarity, *case.options
        assert torch.autograd.gradcheck(lambda w, c=case, o=options: reroute_merged(c.ids, w, *o)[1], weights)


def test_ids_carry_no_gradient():
    """The integer output is outside autograd."""
    case = draw_case(TYPICAL[2], 0, 3)
    case.weights.requires_grad_()
    ids, weights = call(case)
    assert not ids.requires_grad
    assert weights.requires_grad


BAD_WEIGHTS = [
    (torch.ones(3, 4, dtype=torch.int64), TypeError, r"topk_weights: expected a floating-point .* got torch.int64"),
    (torch.ones(3, 5), ValueError, r"topk_weights: expected shape \[3, 4\] .* got \[3, 5\]"),
    (torch.ones(3, 4, device="meta"), ValueError, r"topk_weights: expected device cpu .* got meta"),
]


@pytest.mark.parametrize(("weights", "error", "message"), BAD_WEIGHTS)
def test_bad_weights_are_named(weights, error, message):
    """A wrong argument is reported by name with expected and actual."""
    with pytest.raises(error, match=message):
        reroute_merged(torch.zeros(3, 4, dtype=torch.int64), weights, torch.zeros(8, 8), 2)


def test_bad_arguments_shared_with_reroute_are_named():
    """The checks of sere::reroute run here too, while tracing as well."""
    ids, weights = torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4)
    with pytest.raises(ValueError, match="similarity: expected shape"):
        reroute_merged(ids, weights, torch.zeros(8, 7), 2)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match="topk_weights: expected"):
        reroute_merged(ids, weights[:2], torch.zeros(8, 8), 2)


OPCHECKED = (*TYPICAL, Structure(8, 4, 4))


# By default one with tokens.
@pytest.mark.parametrize(
    ("requires_grad", "num_tokens", "structure"),
    thinned(itertools.product((False, True), (6, 0), OPCHECKED), (0,)),
    ids=str,
)
def test_opcheck(structure, num_tokens, requires_grad, device):
    """Schema, fake kernel, autograd registration and AOT dispatch with symbolic shapes are consistent."""
    case = draw_case(structure, 1, num_tokens).to(device)
    weights = case.weights.to(torch.bfloat16).requires_grad_(requires_grad)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not requires_grad:
        # With a gradient this check adds a float to the sum of the ids, in place, and fails by itself;
        # test_torch_compile_equals_eager covers the compiled backward.
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(OP, (case.ids, weights, case.similarity, *case.options), test_utils=checks)


@pytest.mark.slow
def test_torch_compile_equals_eager(device):
    """Inductor, whole graph, symbolic token count, forward and backward."""
    torch._dynamo.reset()
    structure = TYPICAL[1]
    compiled = torch.compile(reroute_merged, fullgraph=True, dynamic=True)
    for seed, num_tokens in enumerate((6, 13)):
        case = draw_case(structure, seed, num_tokens).to(device)
        ids = case.ids.reshape(-1, 4).contiguous()
        options = case.similarity.contiguous(), 2, 0.3, 4, case.mask.reshape(-1)
        results = []
        for function in (reroute_merged, compiled):
            weights = case.weights.reshape(-1, 4).contiguous().requires_grad_()
            new_ids, new_weights = function(ids, weights, *options)
            (new_weights * torch.arange(4, device=device)).sum().backward()
            results.append((new_ids, new_weights.detach(), weights.grad))
        torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)


class Gate(torch.nn.Module):
    def forward(self, ids, weights, similarity):
        return reroute_merged(ids, weights, similarity, 2, 0.1, 4)


def test_export_keeps_the_operator_and_decomposes_to_aten(device):
    """torch.export with a dynamic T holds one operator; the reference as decomposition leaves only ATen."""
    tokens = torch.export.Dim("tokens", max=4096)
    structure = Structure(60, 4, 2)
    case = draw_case(structure, 0, 6).to(device)
    inputs = case.ids.reshape(-1, 4), case.weights.reshape(-1, 4), case.similarity
    program = torch.export.export(Gate(), inputs, dynamic_shapes=({0: tokens}, {0: tokens}, None))
    assert OP in {n.target for n in program.graph.nodes}
    plain = program.run_decompositions({OP: reroute_merged_reference})
    assert not {n.target for n in plain.graph.nodes} & {OP, torch.ops.sere.reroute.default}
    for num_tokens in (1, 17):
        other = draw_case(structure, 1, num_tokens).to(device)
        inputs = other.ids.reshape(-1, 4), other.weights.reshape(-1, 4), other.similarity
        want = Gate()(*inputs)
        torch.testing.assert_close(program.module()(*inputs), want)
        torch.testing.assert_close(plain.module()(*inputs), want)


@pytest.mark.gpu
def test_cuda_graph_replay():
    """A captured call follows new ids and weights on replay."""
    first, second = (draw_case(Structure(128, 8, 2), seed, 32).to("cuda") for seed in (0, 1))
    ids, weights = first.ids.reshape(-1, 8).contiguous(), first.weights.reshape(-1, 8).contiguous()
    reroute_merged(ids, weights, first.similarity, 2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = reroute_merged(ids, weights, first.similarity, 2)
    for case in (first, second):
        ids.copy_(case.ids.reshape(-1, 8))
        weights.copy_(case.weights.reshape(-1, 8))
        graph.replay()
        torch.testing.assert_close(result, reroute_merged_reference(ids, weights, first.similarity, 2))


def test_the_reference_on_another_device():
    """Everything that it makes is where its tensors are."""
    ids, weights = torch.zeros(4, 3, dtype=torch.int64, device="meta"), torch.rand(4, 3, device="meta")
    real = torch.ones(4, dtype=torch.bool, device="meta")
    found = reroute_merged_reference(ids, weights, torch.rand(6, 6, device="meta"), 1, 0.1, 2, real)
    assert [x.device.type for x in found] == ["meta"] * 2
    assert [x.dtype for x in found] == [torch.int64, torch.float32]
