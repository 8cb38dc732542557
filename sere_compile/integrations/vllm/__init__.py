"""SERE inside vLLM, as a plug-in (`vllm.general_plugins`), for every MoE model it serves. See docs/vllm.md.

LLM(model=..., additional_config={"sere": {"select_top_k": 2}})

Importing this package does not import vLLM.
"""

from .engine import SUPPORTED, EngineMismatchError
from .options import VllmOptions, read_options
from .plugin import register, stats

__all__ = ["SUPPORTED", "EngineMismatchError", "VllmOptions", "read_options", "register", "stats"]
