"""Checks of settings, made when a configuration is made."""

from __future__ import annotations

import math
from typing import Any

from ..errors import UsageError


def require(ok: bool, name: str, value: object, expected: str, remedy: str = "change this setting") -> None:
    """Raise UsageError unless `ok`."""
    if not ok:
        raise UsageError(name, value, expected, remedy)


def require_positive(stage: str, config: Any, *names: str) -> None:
    """Raise UsageError unless these settings of a stage are finite and above 0."""
    for name in names:
        value = getattr(config, name)
        require(math.isfinite(value) and value > 0, f"{stage}.{name}", value, "a number above 0")
