"""The operators of sere-compile, registered with torch under the namespace `sere`.

Each lives in a package of its own with fixed roles: `reference.py` defines it in plain ATen, `kernel.py` holds
the Triton kernels (imported when the first CUDA tensor arrives), `op.py` registers it and chooses between
the two. Importing this module registers `torch.ops.sere.*`; it does not import Triton. (`repeats` is a function for
the vLLM plug-in, no operator.)
"""

from .expert_mlp import expert_mlp
from .fill import fill
from .reroute import reroute
from .reroute_merged import reroute_merged
from .route import route

__all__ = ["expert_mlp", "fill", "reroute", "reroute_merged", "route"]
