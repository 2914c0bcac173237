"""Which stages there are, what each depends on and what it writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import evaluation, stages
from .config import RunConfig
from .context import Context


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the run.

    Attributes:
        name: Its name on the command line.
        folder: Where it writes, below the run folder.
        settings: What of the configuration it depends on.
        needs: Stages whose artefacts it reads.
        make: Does the work.
        outputs: Files and folders that must exist for it to count as done.
        sees_tests: Whether it reads the test images.
    """

    name: str
    folder: str
    settings: Callable[[RunConfig], dict[str, Any]]
    needs: tuple[str, ...]
    make: Callable[[Context, Path, str], None]
    outputs: tuple[str, ...]
    sees_tests: bool = False


STAGES = (
    Stage("cluster", "clustering", lambda c: {"clustering": c.clustering}, (), stages.cluster, ("labels.csv",)),
    Stage(
        "train-diffusion",
        "diffusion",
        lambda c: {"diffusion": c.diffusion, "heldout": c.data.heldout_fraction},
        ("cluster",),
        stages.train_diffusion,
        ("diffusion/unet.safetensors",),
    ),
    Stage(
        "generate",
        "outliers",
        lambda c: {"outliers": c.outliers},
        ("cluster", "train-diffusion"),
        stages.generate,
        ("outliers", "controls"),
    ),
    Stage(
        "train-reference",
        "reference",
        lambda c: {
            "detector": dataclasses.replace(c.detector, outlier_ratio=0, control_ratio=0, lambda_out=0),
            "heldout": c.data.heldout_fraction,
        },
        ("cluster",),
        stages.train_reference,
        ("reference/reference.safetensors",),
    ),
    Stage(
        "inspect",
        "inspection",
        lambda c: {},
        ("cluster", "generate", "train-reference"),
        stages.inspect,
        ("inspection",),
    ),
    Stage(
        "train-detector",
        "detector",
        lambda c: {"detector": c.detector, "heldout": c.data.heldout_fraction},
        ("cluster", "generate"),
        stages.train_three_heads,
        ("detector/detector.safetensors",),
    ),
    Stage(
        "calibrate",
        "calibration",
        lambda c: {"scoring": c.scoring, "heldout": c.data.heldout_fraction, "with outliers": c.detector.outlier_ratio > 0},
        ("generate", "train-detector"),
        stages.calibrate,
        ("detector/bank.safetensors", "detector/score.json", "detector/heldout.csv"),
    ),
    Stage(
        "evaluate",
        "evaluation",
        lambda c: {"ood": c.data.ood},
        ("train-detector", "calibrate"),
        evaluation.evaluate,
        ("evaluation",),
        True,
    ),
    Stage(
        "compare",
        "comparison",
        lambda c: {
            "compare": c.compare,
            "k_distance": c.scoring.k_distance,
            "normalise": c.scoring.normalise,
            "detector": c.detector,
            "ood": c.data.ood,
        },
        ("cluster", "train-reference"),
        evaluation.compare,
        ("comparison/rows.json",),
        True,
    ),
)
BY_NAME = {stage.name: stage for stage in STAGES}


def with_needs(name: str) -> list[Stage]:
    """A stage and everything it needs, in order."""
    wanted = {name}
    for stage in reversed(STAGES):
        if stage.name in wanted:
            wanted.update(stage.needs)
    return [stage for stage in STAGES if stage.name in wanted]
