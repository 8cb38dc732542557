"""The graph as passes see it: one view of a node for every tracer, and running a part of a graph."""
