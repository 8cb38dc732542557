"""What looks like a gate and is none, of the same routers, scorings and selections."""

from .families import FAMILIES, OWN_SELECTION
from .source import look_alike_source

__all__ = ["FAMILIES", "OWN_SELECTION", "look_alike_source"]
