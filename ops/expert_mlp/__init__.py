"""`sere::expert_mlp`: the experts of one Mixture-of-Experts layer, each active expert's weights read once."""

from .op import MAX_TOKENS, expert_mlp, supports
from .reference import ACTIVATIONS, gate_width

__all__ = ["ACTIVATIONS", "MAX_TOKENS", "expert_mlp", "gate_width", "supports"]
