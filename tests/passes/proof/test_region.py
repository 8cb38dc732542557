"""The part of a graph that a proof runs."""

from sere_compile.passes.proof.region import cut_region, hidden_root

from ..moe_modules import TOKENS, Indexed, from_make_fx, one_gate, rows
from ..test_verify_rewrite import weights_of


class Normed(Indexed):
    """The router reads a norm, the experts what is normed."""

    def forward(self, x):
        y = x + 1
        return self.dispatch(y, *self.route(y / y.norm(dim=-1, keepdim=True)))


def test_router_and_experts_read_the_same_hidden_states():
    graph = from_make_fx(Normed(), rows())
    gate = one_gate(graph)
    root = hidden_root(gate.router_input)
    assert root.op == "placeholder"
    region = cut_region(gate, weights_of(graph))
    kinds = sorted(leaf.kind for leaf in region.leaves.values())
    assert kinds == ["hidden", "logits", "state"]
    assert region.ends[0].meta["val"].shape[0] == TOKENS
