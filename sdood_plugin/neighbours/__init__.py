"""Exact k nearest neighbours in squared Euclidean distance; clustering, the score and the duplicate check share it."""

from .bank import Bank, nearest
from .flat import Backend

__all__ = ["Backend", "Bank", "nearest"]
