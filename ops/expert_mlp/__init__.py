"""`sere::expert_mlp`: the experts of one Mixture-of-Experts layer, each active expert's weights read once."""

from .op import MAX_SLOTS, MAX_TOKENS, expert_mlp, expert_mlp_into, supports
from .reference import ACTIVATIONS, gate_width

__all__ = ["ACTIVATIONS", "MAX_SLOTS", "MAX_TOKENS", "expert_mlp", "expert_mlp_into", "gate_width", "supports"]
