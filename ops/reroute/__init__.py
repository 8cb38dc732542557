"""`sere::reroute`: map the ids of a batch of tokens onto its primary experts."""

from .op import reroute

__all__ = ["reroute"]
