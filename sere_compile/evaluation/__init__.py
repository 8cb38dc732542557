"""Quality of a model under re-routing, or under any other routing rule."""

from __future__ import annotations

from .evaluate import Evaluation, evaluate, evaluate_rules
from .rules import Drop, Fill, Recombine, Reroute, RoutingBatch, Rule, TopS

__all__ = [
    "Drop",
    "Evaluation",
    "Fill",
    "Recombine",
    "Reroute",
    "RoutingBatch",
    "Rule",
    "TopS",
    "evaluate",
    "evaluate_rules",
]
