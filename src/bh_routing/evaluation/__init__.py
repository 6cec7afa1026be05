"""Measuring what a routing costs and saves: perplexity, experts and time on a text."""

from .compare import Measured, compare
from .perplexity import cut_windows, perplexity, window_losses

__all__ = ["Measured", "compare", "cut_windows", "perplexity", "window_losses"]
