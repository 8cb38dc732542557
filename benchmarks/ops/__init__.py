"""Timing of single operators on a GPU."""
