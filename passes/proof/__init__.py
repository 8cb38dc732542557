"""The parts of the proof that a rewritten gate computes what re-routing defines."""
