"""Exact k nearest neighbours in squared Euclidean distance; clustering, the score and the duplicate check share it."""

from .bank import Bank, nearest

__all__ = ["Bank", "nearest"]
