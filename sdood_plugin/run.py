"""The stages in order over one run folder: what is done is skipped, what was killed resumes, what changed runs again."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from . import stages
from ._version import __version__
from .artifacts import changes, file_hash, only_process, provenance, read_json, value_hash, write_json, write_text
from .backbones import HUB, weights_file
from .config import RunConfig, as_dict, key_dict
from .context import Context
from .errors import UsageError
from .features import check_backbone
from .stage_table import BY_NAME, Stage, chosen_stages

log = logging.getLogger(__name__)


def run(config: RunConfig, folder: Path, only: str | None = None) -> dict[str, str]:
    """Run all stages, or one with what it needs, and write metrics, figures and the report.

    Args:
        config: The settings.
        folder: The run folder; it may hold an earlier or a killed run.
        only: Name of the last stage to run.

    Returns:
        For each stage `done` (nothing to do) or `ran`.

    Raises:
        UsageError: The folder holds something else.
        RunError: Another process works in it, or a stage failed.
    """
    if config.report and only is None:
        _require_report_extra()
    context = Context(config, folder)
    chosen = chosen_stages(config, only)
    check_input(context, chosen)
    with locked(folder, context.is_main):
        if context.is_main:
            where = "the embedded demo data" if config.data.train.path == "demo" else config.data.train.path
            log.info("training images: %d of %s", len(context.train), where)
            _describe(config, folder)
        context.accelerator.wait_for_everyone()
        outcome = {stage.name: _run_stage(stage, context, asked=stage.name == only) for stage in chosen}
        if context.is_main:
            _write_metrics(context)
            if only is None and config.report:
                from .report.page import write_report

                write_report(folder, truth=_truth(context))
    return outcome


def check_input(context: Context, chosen: list[Stage]) -> None:
    """Read every image set and look for every file once, so that bad input is found before anything is written.

    Args:
        context: The run.
        chosen: The stages that are to run.

    Raises:
        UsageError: A file that is named is not there, the run folder lies among the images, k exceeds its bank, a comparator
            has nothing to train or nothing to be compared on, the diffusion model cannot be trained on such images, or what
            is trained cannot be by so many processes.
        RunError: The images are too few to be clustered, or those of a class.
    """
    config, out = context.config, context.folder.resolve()
    for name, file in (
        ("clustering.labels", config.clustering.labels),
        ("clustering.weights", None if config.clustering.weights == HUB else config.clustering.weights),
        ("detector.weights", weights_file(config.detector.weights)),
    ):
        if file is not None and not Path(file).is_file():
            raise UsageError(name, file, "a file", "check the path")
    tests = [config.data.test] if config.data.test is not None else []
    for images in (config.data.train, *tests, *(ood.images for ood in config.data.ood)):
        place = Path(images.path).resolve()
        if images.path != "demo" and place.is_dir() and out.is_relative_to(place):
            raise UsageError("--out", context.folder, f"a folder outside the images in {images.path}", "choose another folder")
    detector = config.detector
    check_backbone(config.clustering.backbone, config.clustering.weights)
    check_backbone(
        detector.backbone,
        detector.weights,
        pooling=detector.pooling,
        input_size=detector.input_size,
        frozen_blocks=detector.frozen_blocks,
        layer_decay=detector.layer_decay,
    )
    trained = config.compare.methods if BY_NAME["train-comparators"] in chosen else []
    if "fake-it" in trained and config.compare.fake_it_frozen_blocks is not None:
        check_backbone(detector.backbone, detector.weights, frozen_blocks=config.compare.fake_it_frozen_blocks)
    if "mscl" in trained and detector.frozen_blocks == "all":
        raise UsageError(
            "compare.methods", "mscl with detector.frozen_blocks all", "blocks to train", "leave it out: it would be dn2"
        )
    for name, some, wanted in (
        ("data.ood", config.data.ood, "OOD test sets to compare on"),
        ("compare.methods", config.compare.methods, "comparators"),
    ):
        if BY_NAME["compare"] in chosen and not some:
            raise UsageError(name, "none", wanted, f"give --{name}, or leave `compare` out")
    _ = context.train_fingerprint, context.test_fingerprint
    to_train = {stage.name for stage in chosen if stage.name.startswith("train-") and not is_current(stage, context)}
    if "train-diffusion" in to_train or ("train-comparators" in to_train and "fake-it" in trained):
        stages.check_diffusion(context)
    if to_train & {"train-detector", "train-exposed"}:
        stages.check_detector(context, controls=config.outliers.controls, outliers=True)
    if "train-reference" in to_train or ("train-comparators" in to_train and {"multi-class", "fake-it", "oe-noise"} & {*trained}):
        stages.check_detector(context, controls=False, outliers="oe-noise" in trained)
    stages.check_clustering(context)
    bank = int((~context.heldout).sum())
    both = bank * (1 + config.outliers.per_source)  # `outliers.sources` may leave fewer; the score itself checks that
    votes = config.detector.outlier_ratio > 0
    for name, k, most in (("k_distance", config.scoring.k_distance, bank), ("k_vote", config.scoring.k_vote, both)):
        if k > most and (name == "k_distance" or votes):
            raise UsageError(
                f"scoring.{name}", k, f"at most {most} for {bank} training images not held out", "lower it or give more images"
            )


def draw_report(folder: Path) -> Path:
    """Draw the figures and the report of a finished run again, from its files.

    Raises:
        UsageError: The folder is no run folder, or the `report` extra is absent.
    """
    _require_report_extra()
    if not (folder / "run.json").exists():
        raise UsageError("--out", folder, "a run folder", "give the --out of an earlier `sdood run`")
    from .report.page import write_report

    return write_report(folder)


def _require_report_extra() -> None:
    from importlib.util import find_spec

    absent = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if absent:
        raise UsageError(
            "report",
            f"no {' and no '.join(absent)}",
            "the `report` extra",
            "pip install 'sdood_plugin[report]' or give --report false",
        )


def _truth(context: Context) -> dict[str, Any]:
    """What only the report may know: the true labels' verdict on the pseudo-labels and on g_in."""
    return {
        "label_quality": stages.label_quality(context),
        "id_accuracy": stages.true_accuracy(context),
        "notes": context.train.notes,
    }


@contextmanager
def locked(folder: Path, is_main: bool) -> Iterator[None]:
    """Hold a run folder against other processes; those of one launch rely on the main one.

    Raises:
        UsageError: It holds something else.
        RunError: Another process works in it, or nobody can.
    """
    if not is_main:
        yield
        return
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if "run.json" not in present and any(name != "config.yaml" and not name.startswith(".") for name in present):
        raise UsageError(
            "--out", folder, "a new folder, an empty one, or an earlier run's", "choose another folder; nothing was written"
        )
    with only_process(folder, "run folder"):
        yield


def _describe(config: RunConfig, folder: Path) -> None:
    write_text(folder / "config.yaml", yaml.safe_dump(as_dict(config), sort_keys=False))
    write_json(folder / "run.json", {**provenance(sys.argv), "seed": config.seed, "config_sha256": value_hash(as_dict(config))})


def _key_parts(stage: Stage, context: Context) -> dict[str, Any]:
    """What a stage's artefacts depend on; JSON-able."""
    config = context.config
    parts: dict[str, Any] = {"version": __version__, "seed": config.seed, "train images": context.train_fingerprint}
    for name, value in stage.settings(config).items():
        parts[name] = (
            key_dict(value)
            if dataclasses.is_dataclass(value)
            else [as_dict(v) for v in value]
            if isinstance(value, tuple)
            else value
        )
    given = config.clustering.labels
    if stage.name == "cluster" and given is not None:
        parts["label file"] = file_hash(Path(given))
    weights = config.clustering.weights if stage.name == "cluster" else config.detector.weights if "detector" in parts else None
    if file := weights_file(weights):
        parts["weights file"] = file_hash(file)
    if stage.name == "cluster" and config.clustering.method == "given" and given is None and context.train.labels is not None:
        parts["labels"] = value_hash(context.train.labels.tolist())
    if stage.sees_tests:
        parts["test images"] = context.test_fingerprint
    for need in stage.needed(config):
        parts[f"result of {need.name}"] = read_json(_record_path(context.folder, need.name))["result"]
    return parts


def _record_path(folder: Path, name: str) -> Path:
    return folder / "stages" / f"{name}.json"


def _run_stage(stage: Stage, context: Context, *, asked: bool) -> str:
    parts = _key_parts(stage, context)
    key = value_hash(parts)
    record_path = _record_path(context.folder, stage.name)
    record = read_json(record_path) if record_path.exists() else None
    outputs = [context.folder / output for output in stage.writes(context.config)]
    context.accelerator.wait_for_everyone()  # every process has read the record before one may remove it
    done = record is not None and record["key"] == key and not _lost(record, context.folder)
    if done and (not asked or stage.whole(context)):
        log.info("%s: done, skipped", stage.name)
        return "done"
    if record is not None:
        log.info(
            "%s: runs again: %s", stage.name, changes(record["parts"], parts) or "its files are gone, changed or a substitute"
        )
    else:
        log.info("%s", stage.name)
    folder = context.folder / stage.folder
    if context.is_main:
        _clear(stage, context, key)
    context.accelerator.wait_for_everyone()
    started = time.time()
    stage.make(context, folder, key)
    context.accelerator.wait_for_everyone()
    if context.is_main:
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        (folder / ".key").unlink(missing_ok=True)
        hashes = {path.relative_to(context.folder).as_posix(): file_hash(path) for output in outputs for path in _files(output)}
        write_json(
            record_path,
            {
                "key": key,
                "result": value_hash(hashes),
                "seconds": round(time.time() - started, 2),
                "parts": parts,
                "outputs": {output.relative_to(context.folder).as_posix(): len(_files(output)) for output in outputs},
                "made_by": provenance(sys.argv),
            },
        )
    context.accelerator.wait_for_everyone()
    return "ran"


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _lost(record: dict[str, Any], folder: Path) -> bool:
    """Whether files that a finished stage wrote are gone."""
    return any(len(_files(folder / output)) < count for output, count in record["outputs"].items())


def is_current(stage: Stage, context: Context) -> bool:
    """Whether a stage's artefacts are those of this configuration: itself and all it needs are done."""
    record_path = _record_path(context.folder, stage.name)
    if not record_path.exists() or not all(is_current(need, context) for need in stage.needed(context.config)):
        return False
    record = read_json(record_path)
    return record["key"] == value_hash(_key_parts(stage, context)) and not _lost(record, context.folder)


def _clear(stage: Stage, context: Context, key: str) -> None:
    """Remove what an earlier configuration left; what a killed run of this one left stays."""
    folder = context.folder / stage.folder
    if stage.keeps:
        _record_path(context.folder, stage.name).unlink(missing_ok=True)
        return
    marker = folder / ".key"
    if marker.exists() and marker.read_text() == key:
        for path in [file for output in (stage.folder, *stage.outputs) for file in (context.folder / output).rglob(".*.*")]:
            path.unlink(missing_ok=True)  # half-written files of the kill
        return
    _record_path(context.folder, stage.name).unlink(missing_ok=True)
    for path in {folder, *((context.folder / output) for output in stage.outputs)}:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    write_text(marker, key)


def _write_metrics(context: Context) -> None:
    """metrics.json: the rows of the detector and of the comparators, those that belong to this configuration."""
    rows = [
        row
        for name in ("evaluate", "compare")
        if is_current(BY_NAME[name], context)
        for row in read_json(context.folder / BY_NAME[name].folder / "rows.json")
    ]
    write_json(context.folder / "metrics.json", {"rows": rows})
