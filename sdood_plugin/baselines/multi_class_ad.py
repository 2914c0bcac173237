"""Multi-class AD (Cohen, Abutbul & Hoshen, "Out-of-distribution detection without class labels", ECCV workshops 2022).

Two stages: pseudo-labels by clustering (SCAN), then a pre-trained network fine-tuned on them by cross-entropy, whose
features score images as DN2 does. The pseudo-labels are those of this run, so ours and this one see the same. No
official code could be found; neighbours and distance are DN2's, of the same authors. Fine-tuning takes the detector's own
optimiser, epochs and augmentation, with neither outliers nor controls, and a learning rate of its own where one is set.
Where the detector starts from random weights this still starts from pre-trained ones, as its paper has it: that, the
outliers and the controls are what sets ours apart, not the outliers alone.
"""

from __future__ import annotations

import dataclasses

from ..config import CompareConfig, DetectorConfig


def fine_tuning(config: DetectorConfig, pretrained: str, compare: CompareConfig) -> DetectorConfig:
    """The detector's settings for cross-entropy on pseudo-labels alone, from pre-trained weights."""
    return dataclasses.replace(
        config, weights=pretrained, outlier_ratio=0.0, control_ratio=0.0, lr=compare.multi_class_lr or config.lr
    )
