"""`python -m sere_compile` is the `sere` command."""

from .cli import main

main(prog_name="sere")
