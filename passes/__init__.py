"""FX passes: find MoE gates in traced graphs and re-route their dispatch.

A rewrite of one graph is, in this order:

1. `find_gates`: which selections are gates, what each use of their ids does, what was refused and why.
2. `extract_dispatch`: a gate's dispatch as a function, where its experts have to be probed.
3. `fuse_experts`: the dispatch becomes one operator of ours, where a GPU gains by it.
4. `fuse_router`: scoring, selection and weighing become one operator of ours, likewise.
5. `fuse_reroute`: that operator re-routes too, where nobody else reads its ids; or
   `reroute_dispatch`: the dispatch uses read re-routed ids.
6. `insert_count`: statistics, when asked for.

Passes know graphs only: no model, no file format, no tracer's own objects. `passes/README.md` has the invariants.
"""

from .count_routing import COUNTED, insert_count
from .evidence.norm_scale import NormScale, find_norm_scale
from .extract_dispatch import DispatchRegion, extract_dispatch
from .find_gates import Findings, find_gates
from .fuse_experts import MAX_SLOTS, MAX_TOKENS, ExpertLayer, fuse_experts
from .fuse_reroute import fuse_reroute
from .fuse_router import fuse_router
from .gate import Gate, Skip, SkipReason, Use, UseKind
from .reroute_dispatch import Rewrite, RoutingSettings, reroute_dispatch
from .verify_rewrite import Proof, verify_rewrite

__all__ = [
    "COUNTED",
    "MAX_SLOTS",
    "MAX_TOKENS",
    "DispatchRegion",
    "ExpertLayer",
    "Findings",
    "Gate",
    "NormScale",
    "Proof",
    "Rewrite",
    "RoutingSettings",
    "Skip",
    "SkipReason",
    "Use",
    "UseKind",
    "extract_dispatch",
    "find_gates",
    "find_norm_scale",
    "fuse_experts",
    "fuse_reroute",
    "fuse_router",
    "insert_count",
    "reroute_dispatch",
    "verify_rewrite",
]
