"""Progress bars with the time left, and which of a launcher's processes speaks."""

from __future__ import annotations

import os
import sys

from tqdm import tqdm


def speaks() -> bool:
    """Whether this process is the one of a launcher's that prints; without a launcher it is."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def progress_bar(name: str, total: int, unit: str, *, done: int = 0, delay: float = 0.0) -> tqdm:
    """A bar of the process that speaks; on a terminal it moves each second, in a log it is written each half minute.

    Args:
        name: What is being done.
        total: Units there are.
        unit: What one is called.
        done: Units done before.
        delay: Seconds of work from which it is shown.
    """
    interval = 1.0 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, initial=done, desc=name, unit=unit, disable=not speaks(), mininterval=interval, delay=delay)
