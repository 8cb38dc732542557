"""Calibration: the similarity of experts on the tokens of real data."""
