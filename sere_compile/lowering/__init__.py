"""SERE outside of Python: one module for each target, each imported on its own (`sere_compile.lowering.aot`)."""
