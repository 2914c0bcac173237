"""Which stages there are, what each depends on and what it writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import comparison, evaluation, generation, inspection, stages
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
        also: Those that must under a configuration.
        sees_tests: Whether it reads the test images.
        keeps: Whether it decides itself what of an earlier configuration's files can stay.
        wanted: Whether a configuration has any use of it.
        whole: Whether its files are what they should be, once it is done; looked at where the stage is the one that is asked for.
    """

    name: str
    folder: str
    settings: Callable[[RunConfig], dict[str, Any]]
    needs: tuple[str, ...]
    make: Callable[[Context, Path, str], None]
    outputs: tuple[str, ...]
    sees_tests: bool = False
    keeps: bool = False
    also: Callable[[RunConfig], tuple[str, ...]] = lambda _config: ()
    wanted: Callable[[RunConfig], bool] = lambda _config: True
    whole: Callable[[Context], bool] = lambda _run: True

    def writes(self, config: RunConfig) -> tuple[str, ...]:
        """What must exist for it to count as done under a configuration."""
        return self.outputs + self.also(config)

    def needed(self, config: RunConfig) -> list[Stage]:
        """The stages it reads artefacts of under a configuration."""
        return [BY_NAME[name] for name in self.needs if BY_NAME[name].wanted(config)]


def _compares(config: RunConfig) -> bool:
    """Whether there are comparators, and OOD test sets to compare them on."""
    return bool(config.data.ood and config.compare.methods)


STAGES = (
    Stage(
        "cluster",
        "clustering",
        lambda c: {"clustering": c.clustering},
        (),
        stages.cluster,
        ("labels.csv",),
        also=lambda c: ("clustering/backbone.safetensors",) if c.clustering.leaves_backbone else (),
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
        ("cluster", "train-reference", "train-diffusion"),
        generation.generate,
        ("outliers",),
        keeps=True,
        also=lambda c: ("controls",) if c.outliers.controls else (),
        whole=generation.whole,
    ),
    Stage(
        "inspect",
        "inspection",
        lambda c: {"inspection": c.inspection, "selection": c.selection},
        ("cluster", "generate", "train-reference"),
        inspection.inspect,
        ("inspection",),
        whole=inspection.whole,
    ),
    Stage(
        "train-detector",
        "detector",
        lambda c: {"detector": c.detector, "selection": c.selection, "heldout": c.data.heldout_fraction},
        ("cluster", "generate"),
        stages.train_three_heads,
        ("detector/detector.safetensors",),
    ),
    Stage(
        "calibrate",
        "calibration",
        lambda c: {
            "scoring": c.scoring,
            "heldout": c.data.heldout_fraction,
            "with outliers": c.detector.outlier_ratio > 0,
            "alpha": "on outliers of other classes, against images and controls",  # runs of 0.2.0 are calibrated again
            "held-out images": "by the terms of their score",  # and those whose bank has the scores alone
        },
        ("generate", "train-detector"),
        stages.calibrate,
        ("detector/bank.safetensors", "detector/score.json", "detector/heldout.csv"),
    ),
    Stage(
        "train-comparators",
        "comparators",
        lambda c: {
            "compare": c.compare,
            "clustering": c.clustering,
            "diffusion": c.diffusion,
            "detector": c.detector,
            "heldout": c.data.heldout_fraction,
        },
        ("cluster", "train-reference"),
        comparison.train_comparators,
        ("comparators",),
        keeps=True,
        wanted=_compares,
    ),
    Stage(
        "train-exposed",
        "exposed",
        lambda c: {
            "methods": ", ".join(method for method in c.compare.methods if method in comparison.EXPOSED),
            "detector": c.detector,
            "selection": c.selection,
            "heldout": c.data.heldout_fraction,
        },
        ("cluster", "generate"),
        comparison.train_exposed,
        ("exposed",),
        keeps=True,
        wanted=lambda c: _compares(c) and any(method in comparison.EXPOSED for method in c.compare.methods),
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
            "methods": ", ".join(c.compare.methods),
            "k_distance": c.scoring.k_distance,
            "normalise": c.scoring.normalise,
            "ood": c.data.ood,
        },
        ("cluster", "train-reference", "train-comparators", "train-exposed"),
        comparison.compare,
        ("comparison",),
        True,
        wanted=_compares,
    ),
)
BY_NAME = {stage.name: stage for stage in STAGES}


def chosen_stages(config: RunConfig, last: str | None = None) -> list[Stage]:
    """All stages that a configuration has a use of, or one of them and everything it needs, in order."""
    wanted = {stage.name for stage in STAGES if stage.wanted(config)} if last is None else {last}
    for stage in reversed(STAGES):
        if stage.name in wanted:
            wanted.update(need.name for need in stage.needed(config))
    return [stage for stage in STAGES if stage.name in wanted]
