"""Semantic-discrepant outliers by diffusion, and the out-of-distribution detector trained on them.

Importing this is cheap: a public name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .config import RunConfig
    from .decision import Detector
    from .errors import SdoodError
    from .outliers.dataset import OutlierSet
    from .run import run

_PUBLIC = {"Detector": "decision", "OutlierSet": "outliers.dataset", "RunConfig": "config", "SdoodError": "errors", "run": "run"}
__all__ = ["Detector", "OutlierSet", "RunConfig", "SdoodError", "__version__", "run"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
