"""Multi-class AD (Cohen, Abutbul & Hoshen, "Out-of-distribution detection without class labels", ECCV workshops 2022).

Two stages: pseudo-labels by clustering (SCAN), then a pre-trained network fine-tuned on them by cross-entropy, whose
features score images as DN2 does. The pseudo-labels are those of this run, so ours and this one see the same. No
official code could be found; neighbours and distance are DN2's, of the same authors. Fine-tuning takes the detector's own
optimiser, epochs and augmentation without outliers, so that outliers are the only difference to ours.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..config import DetectorConfig


def fine_tuning(config: DetectorConfig, pretrained: Path) -> DetectorConfig:
    """The detector's settings for cross-entropy on pseudo-labels alone, from pre-trained weights."""
    return dataclasses.replace(config, weights=str(pretrained), outlier_ratio=0.0, control_ratio=0.0)
