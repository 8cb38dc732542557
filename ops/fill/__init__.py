"""`sere::fill`: keep the experts that matter most to a batch, fill lost slots by the tokens' own scores."""

from .op import fill

__all__ = ["fill"]
