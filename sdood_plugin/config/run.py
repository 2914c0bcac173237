"""Everything a run needs, as the sum of its stages' settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from .check import require, require_types
from .clustering import ClusteringConfig
from .compare import CompareConfig
from .data import DataConfig
from .detector import DetectorConfig, ScoringConfig
from .diffusion import DiffusionConfig
from .outliers import OutliersConfig, bounds
from .selection import InspectionConfig, SelectionConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs.

    Args:
        seed: Root seed every other seed is derived from.
        device: `auto` takes a GPU where there is one.
        precision: Of training and sampling; `auto` is bf16 on a GPU and float32 on a CPU, where bf16 is the faster one if the
            processor has instructions for it (AVX512-BF16, AMX). What is done stays done when it changes, but an outlier set
            is made in one precision.
        checkpoint_seconds: How often a training writes a checkpoint it can resume from.
        report: Draw figures and write report.html.
        data: The images.
        clustering: Pseudo-labels.
        diffusion: The diffusion model.
        outliers: The outlier set.
        selection: Which of its outliers the detector is trained on.
        inspection: What its quality is measured with.
        detector: The detector.
        scoring: The score.
        compare: The comparators.
    """

    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bf16"] = "auto"
    checkpoint_seconds: float = 30.0
    report: bool = True
    data: DataConfig = field(default_factory=DataConfig)
    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    outliers: OutliersConfig = field(default_factory=OutliersConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    inspection: InspectionConfig = field(default_factory=InspectionConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)

    def __post_init__(self) -> None:
        require_types("{}", self)
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        require(self.checkpoint_seconds >= 0, "checkpoint_seconds", self.checkpoint_seconds, "0 (every step) or more")
        if self.data.image_size is not None:
            self.diffusion.require_side(self.data.image_size)
        require(
            bounds(self.outliers.start_fraction)[1] <= self.diffusion.max_start_fraction,
            "outliers.start_fraction",
            self.outliers.start_fraction,
            f"at most diffusion.max_start_fraction = {self.diffusion.max_start_fraction}",
            "raise --diffusion.max_start_fraction too: the model never saw more noise than that",
        )
        most = max(1, round(bounds(self.outliers.start_fraction)[0] * self.diffusion.timesteps))
        require(
            self.outliers.sampling_steps <= most,
            "outliers.sampling_steps",
            self.outliers.sampling_steps,
            f"at most {most}: the steps from S = {bounds(self.outliers.start_fraction)[0]} T to 0",
            "lower it, or raise --outliers.start_fraction",
        )


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested plain values."""
    return dataclasses.asdict(config)


def key_dict(stage: Any) -> dict[str, Any]:
    """A stage's settings as its results are known by: without `compile`, which changes how they round, as a device does."""
    found = dataclasses.asdict(stage)
    return {**found, "compile": False} if "compile" in found else found
