"""The stage that judges an outlier set, and the same for a bare folder outside any run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .artifacts import read_json, write_json, write_tensors
from .config import RunConfig
from .context import Context
from .data.images import spread
from .errors import UsageError
from .generation import load_judge

TRIPLETS = 16
log = logging.getLogger(__name__)


def inspect(run: Context, folder: Path, key: str) -> None:
    """quality.json and the choice of images for triplets and grids, of outliers and controls; judged by the reference network."""
    from .outliers.dataset import OutlierSet
    from .outliers.fidelity import Features, load_features
    from .outliers.inspect import report_set

    judge, selection, inspection = load_judge(run), run.config.selection, run.config.inspection
    reference = Features(f"the reference network's features ({run.config.detector.backbone})", lambda images: judge(images)[0])
    features = load_features(inspection, run.accelerator.device, reference)

    def seen(images: torch.Tensor) -> torch.Tensor:
        return judge(images)[1].argmax(dim=1).cpu()

    names = [name for name in ("outliers", "controls") if (run.folder / name / "meta.json").exists()]
    sets = {name: OutlierSet(run.folder / name) for name in names}
    quality = {name: report_set(made, run.train, features, selection, inspection) for name, made in sets.items()}
    right = seen(run.train.images) == run.labels.labels
    for name, made in sets.items():
        quality[name]["source_accuracy"] = 100.0 * float(right[made.sources].double().mean())
    if run.is_main:
        warn_of_controls(quality.get("controls"))
        write_json(folder / "quality.json", quality)
        _write_triplets(run, folder / "triplets.safetensors", sets, seen)
        _write_grids(folder, sets["outliers"])


def warn_of_controls(quality: dict[str, Any] | None) -> None:
    """Log it where controls, which mean what their sources mean, are rarely seen so: outliers made like them show little."""
    if quality is not None and 2 * quality["stay_rate"] < quality["source_accuracy"]:
        log.warning(
            "only %.0f %% of the same-class controls are seen as their class (%.0f %% of their sources): the diffusion model is "
            "not good enough for this S; raise --diffusion.steps or lower --outliers.start_fraction",
            quality["stay_rate"],
            quality["source_accuracy"],
        )


def inspect_folder(config: RunConfig, made: Path, out: Path) -> Path:
    """Grids of an outlier set and, where `inspection.features` can do without a run, its quality, as OUT/report.html.

    Args:
        config: `data` names the images the set was made from (they are read for the quality alone), `inspection` the features.
        made: The outlier set.
        out: A new folder, or one an earlier call wrote.

    Raises:
        UsageError: `out` holds something else, a run among it, or lies in the set.
        RunError: The set is broken or was made of other images.
    """
    from .outliers.dataset import OutlierSet
    from .outliers.fidelity import load_features
    from .outliers.inspect import check_sources, report_set
    from .report.page import write_quality_page

    if out.resolve().is_relative_to(made.resolve()):
        raise UsageError("--out", out, "a folder outside the outlier set", "choose another folder")
    if (out / "run.json").exists():
        raise UsageError("--out", out, "another folder than a run's, which has its own report", "choose a new folder")
    if out.exists() and any(out.iterdir()) and not (out / "inspection" / "grids.json").exists():
        raise UsageError("--out", out, "a new folder, an empty one, or an earlier inspection", "choose another folder")
    chosen, folder = OutlierSet(made), out / "inspection"
    if config.inspection.features != "reference":
        run = Context(config, out)
        check_sources(chosen, run.train)  # before features are loaded
        features = load_features(config.inspection, run.accelerator.device)
        write_json(
            folder / "quality.json",
            {made.resolve().name: report_set(chosen, run.train, features, config.selection, config.inspection)},
        )
    else:
        log.info("grids alone: `inspection.features: reference` needs the run; for the quality give --inspection.features pixels")
    _write_grids(folder, chosen)
    return write_quality_page(out)


def whole(run: Context) -> bool:
    """Whether the distances are over the features that were asked for, not over those that could be had instead."""
    found = read_json(run.folder / "inspection" / "quality.json")
    return not any("instead_of" in one["fidelity"] for one in found.values())


def _write_triplets(run: Context, path: Path, sets: dict[str, Any], seen: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Sources spread over the set, their controls and their outliers, and the class each is seen as."""
    made = sets["outliers"]
    rows = spread(len(made), min(TRIPLETS, len(made)))
    sources = made.sources[rows]
    strips = {"source": run.train.images[sources], "outlier": made.read(rows)}
    if "controls" in sets:
        position = {source: row for row, source in enumerate(sets["controls"].sources.tolist())}
        strips["control"] = sets["controls"].read(torch.tensor([position[source] for source in sources.tolist()]))
    write_tensors(path, {**strips, **{f"{name}_said": seen(images) for name, images in strips.items()}})


def _write_grids(folder: Path, made: Any) -> None:
    """grids.json with the names of rows and columns, grids.safetensors with uint8 (R, K, 3, H, W); white where there is none."""
    from .outliers.inspect import grids

    chosen, tensors = grids(made), {}
    for name, grid in chosen.items():
        index = torch.tensor(grid.pop("index"))
        rows, place = index.clamp(min=0).unique(return_inverse=True)
        tensors[name] = made.read(rows)[place]
        tensors[name][index < 0] = 255
    write_tensors(folder / "grids.safetensors", tensors)
    write_json(folder / "grids.json", chosen)
