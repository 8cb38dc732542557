"""`sere::reroute_merged`: re-route, then merge the slots of a token that name the same expert."""

from .op import reroute_merged

__all__ = ["reroute_merged"]
