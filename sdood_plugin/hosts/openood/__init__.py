"""OpenOOD with this package's outliers, detector and score; nothing of the host is imported before it is used.

The network takes what the host's loaders give, so loaders, pipelines and stock postprocessors stay as they are. The
host scores larger = in-distribution; the sign is turned in `postprocessor.py` and nowhere else.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "SDOODNet": "network",
    "load_detector": "checkpoints",
    "load_checkpoint": "checkpoints",
    "SDOODPostprocessor": "postprocessor",
    "SDOODTrainer": "trainer",
    "TrainSDOOD": "pipeline",
    "Evaluator": "evaluator",
    "on_device": "device",
    "export_openood": "export",
    "doctor": "host",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
