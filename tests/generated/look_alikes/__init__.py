"""What looks like a gate and is none, put together from the same routers, scorings and selections as gates are."""

from .families import FAMILIES, OWN_SELECTION
from .source import look_alike_source

__all__ = ["FAMILIES", "OWN_SELECTION", "look_alike_source"]
