"""Fixtures of every test in this folder."""

from .fixtures import bench, subject, unsorted, without_gpu

__all__ = ["bench", "subject", "unsorted", "without_gpu"]
