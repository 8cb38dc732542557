"""FX passes: find MoE gates in traced graphs and re-route their dispatch.

`find_gates` says which selections are gates, what each use of their ids does, what was refused and
why. `PIPELINE` lists, in order, what is then done to each gate; `run_pipeline` does it.

Passes know graphs only: no model, no file format, no tracer's own objects. `passes/README.md` has
the invariants.
"""

from .check_savings import check_savings
from .count_routing import COUNTED, count_routing
from .evidence.norm_scale import NormScale, find_norm_scale
from .extract_dispatch import DispatchRegion, extract_dispatch
from .find_gates import Findings, find_gates
from .fuse_experts import ExpertLayer, fuse_experts
from .fuse_reroute import fuse_reroute
from .fuse_router import fuse_router
from .gate import Evidence, Gate, Skip, SkipReason, Use, UseKind
from .kernel_gains import has_more_tokens
from .pack_gqa import PackedAttention, pack_gqa
from .pipeline import PIPELINE, Pass, Run, run_pipeline
from .reroute_dispatch import Rewrite, RoutingSettings, redirect_dispatch, reroute_dispatch
from .separate_kept import find_separate_gates, separate_kept
from .separate_statistics import separate_statistics
from .verify_rewrite import Proof, verify_rewrite

__all__ = [
    "COUNTED",
    "PIPELINE",
    "DispatchRegion",
    "Evidence",
    "ExpertLayer",
    "Findings",
    "Gate",
    "NormScale",
    "PackedAttention",
    "Pass",
    "Proof",
    "Rewrite",
    "RoutingSettings",
    "Run",
    "Skip",
    "SkipReason",
    "Use",
    "UseKind",
    "check_savings",
    "count_routing",
    "extract_dispatch",
    "find_gates",
    "find_norm_scale",
    "find_separate_gates",
    "fuse_experts",
    "fuse_reroute",
    "fuse_router",
    "has_more_tokens",
    "pack_gqa",
    "redirect_dispatch",
    "reroute_dispatch",
    "run_pipeline",
    "separate_kept",
    "separate_statistics",
    "verify_rewrite",
]
