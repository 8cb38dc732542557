"""Quality of a model under re-routing, or under any other routing rule."""

from __future__ import annotations

from .configured import ConfiguredRule
from .evaluate import evaluate, evaluate_rules
from .recombine import Recombine
from .result import Evaluation
from .rules import Drop, Fill, Reroute, RoutingBatch, Rule, TopS

__all__ = [
    "ConfiguredRule",
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
