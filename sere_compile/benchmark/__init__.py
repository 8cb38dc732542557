"""What `sere bench` runs: gating, the Mixture-of-Experts layer and the decode step, stock against ours."""
