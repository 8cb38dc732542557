"""Similarity of experts: profiles, their files, and which matrix belongs to which router weight."""

from .profile import SimilarityProfile, attach, detach

__all__ = ["SimilarityProfile", "attach", "detach"]
