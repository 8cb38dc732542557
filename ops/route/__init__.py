"""`sere::route`: from router logits to expert ids and routing weights."""

from .op import route

__all__ = ["route"]
