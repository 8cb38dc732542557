"""Similarity of experts: profiles, their files, and which matrix belongs to which router weight."""

from .attach import attach, detach
from .profile import SimilarityProfile

__all__ = ["SimilarityProfile", "attach", "detach"]
