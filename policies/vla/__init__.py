"""Robot policies: what they see is pruned inside a deadline."""

from .loading import load

__all__ = ["load"]
