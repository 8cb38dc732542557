"""Running experts: who owns a router weight, the experts beside it, counterfactual runs, probing, metrics."""
