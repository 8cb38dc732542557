"""sere-compile: similarity-based expert re-routing (SERE, arXiv 2602.07616) as a compiler pass.

compiled = torch.compile(model, backend="sere", options={"select_top_k": 2})
"""

from .backend import SereBackend, sere_backend
from .calibration.calibrate import calibrate
from .capture import compile
from .config import SereConfig
from .errors import (
    ArgumentError,
    CalibrationError,
    ConfigError,
    EvaluationError,
    GateNotFoundError,
    LoweringError,
    MissingExtraError,
    ModelNotFoundError,
    OutputError,
    ProbeError,
    ProfileError,
    SereError,
)
from .evaluation import Evaluation, evaluate
from .explain import explain
from .integrations.experts import register_experts
from .integrations.generate import generate_config
from .integrations.packed_experts import pack_experts
from .report import GateReport, GateRow
from .rewrite import rewrite
from .similarity.attach import attach, detach
from .similarity.profile import SimilarityProfile
from .similarity.profile_file import library_version
from .statistics import GateStats, reset_stats, stats

__version__ = library_version()

__all__ = [
    "ArgumentError",
    "CalibrationError",
    "ConfigError",
    "Evaluation",
    "EvaluationError",
    "GateNotFoundError",
    "GateReport",
    "GateRow",
    "GateStats",
    "LoweringError",
    "MissingExtraError",
    "ModelNotFoundError",
    "OutputError",
    "ProbeError",
    "ProfileError",
    "SereBackend",
    "SereConfig",
    "SereError",
    "SimilarityProfile",
    "__version__",
    "attach",
    "calibrate",
    "compile",
    "detach",
    "evaluate",
    "explain",
    "generate_config",
    "pack_experts",
    "register_experts",
    "reset_stats",
    "rewrite",
    "sere_backend",
    "stats",
]
