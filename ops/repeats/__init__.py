"""A token's slots of one expert made one: for kernels that take the experts of a token for different ones.

No operator: it is called where no tracer comes, inside one of vLLM's own.
"""

from .merge import merge_repeats

__all__ = ["merge_repeats"]
