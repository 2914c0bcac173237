"""A finished run as an OpenOOD data root: images, imglists and YAMLs; `commands.py` has the lines that start the host on them."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser

from ...artifacts import write_text
from ...backbones import HUB, weights_file
from ...config import DetectorConfig, RunConfig
from ...context import Context
from ...data.images import ImageSet, save_png
from ...errors import UsageError
from ...outliers.dataset import OutlierSet
from .commands import command_lines
from .yamls import write_yamls

IMAGES, LISTS, CONFIGS = Path("images_classic/sdood"), Path("benchmark_imglist/sdood"), Path("sdood")
# splits of what was generated, by whether its source is held out
MADE = {"outliers": {False: "oe", True: "oe_heldout"}, "controls": {False: "controls", True: "controls_heldout"}}


def export_openood(run_folder: str | Path, dest: str | Path) -> str:
    """Write a run's images and outliers as OpenOOD reads them.

    Below `dest`, which may be the host's own data folder: images_classic/sdood, benchmark_imglist/sdood and sdood (the
    YAMLs and commands.txt). ID images carry their pseudo-labels and an outlier its SOURCE's; held-out images become the
    validation split and their outliers the OOD validation set, so the host's parameter search sees no test image. Where the
    run's classes are pseudo-labels, those of its test images are not known: `test` says 0 throughout, and test accuracy and
    the host's column ACC mean nothing. commands.txt says that, and what of the run's detector the host does not train.

    Args:
        run_folder: A run whose outliers are generated.
        dest: Where to write.

    Returns:
        The command lines, ready to paste.

    Raises:
        UsageError: No such run, or an earlier export is in the way.
        RunError: The run's images changed, or its outlier set is broken.
    """
    run_folder, dest = Path(run_folder), Path(dest)
    context = Context(_read_config(run_folder), run_folder)
    if not (run_folder / "outliers" / "meta.json").is_file():
        raise UsageError(f"run folder {run_folder}", "no finished outliers", "a run with them", "run `sdood generate` first")
    taken = next((dest / part for part in (IMAGES, LISTS, CONFIGS) if (dest / part).exists()), None)
    if taken is not None:
        raise UsageError("DEST", f"{taken} of an earlier export", "a folder without one", "delete it or choose another DEST")
    labels, heldout = context.labels, context.heldout
    made = {name: OutlierSet(run_folder / name) for name in MADE if (run_folder / name / "meta.json").is_file()}
    for images in made.values():
        images.verify()
    lists = _write_id(context, labels.labels, heldout, dest)
    for name, images in made.items():
        lists |= _write_made(run_folder / name, images, heldout, MADE[name], dest)
    groups = _write_ood(context, dest)
    _write_configs(context, labels.classes, lists, groups, dest)
    detector = run_folder.resolve() / "detector"
    scores = all(groups.values()) and (detector / "bank.safetensors").is_file()
    text = command_lines(
        (dest / CONFIGS).resolve(), lists["train"], lists.get("oe", 0), detector if scores else None, _notes(context)
    )
    write_text(dest / CONFIGS / "commands.txt", text)
    return text


def _test_labelled(context: Context) -> bool:
    """Whether the list `test` has classes of the kind that are trained; without test images it is the held-out images' list."""
    return context.test is None or (context.config.clustering.method == "given" and context.test.labels is not None)


def _notes(context: Context) -> list[str]:
    notes = []
    if not _test_labelled(context):
        notes.append(
            "the run's classes are pseudo-labels, those of its test images are not known and test.txt says 0 throughout: "
            "test accuracy and the column ACC mean nothing"
        )
    own, usual = context.detector, DetectorConfig()
    if own.frozen_blocks != usual.frozen_blocks:
        notes.append(
            f"`three heads` trains all of {own.backbone}; the run's detector had frozen_blocks {own.frozen_blocks}, which the "
            "host's YAMLs cannot say"
        )
    return notes


def _read_config(run_folder: Path) -> RunConfig:
    file = run_folder / "config.yaml"
    if not file.is_file():
        raise UsageError("RUN", run_folder, "a run folder", "give the --out of an earlier `sdood run`")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig, "run")
    return parser.instantiate(parser.parse_object({"run": yaml.safe_load(file.read_text())})).run


def _write_images(images: ImageSet, rows: torch.Tensor, folder: str, dest: Path) -> list[str]:
    """PNG files of some images; returns their paths below images_classic."""
    names = [f"sdood/{folder}/{row:07d}.png" for row in rows.tolist()]
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda pair: save_png(dest / IMAGES.parent / pair[0], images.images[pair[1]]),
                zip(names, rows.tolist(), strict=True),
            )
        )
    return names


def _write_list(dest: Path, split: str, names: list[str], labels: list[int]) -> int:
    write_text(dest / LISTS / f"{split}.txt", "".join(f"{name} {label}\n" for name, label in zip(names, labels, strict=True)))
    return len(names)


def _write_id(context: Context, labels: torch.Tensor, heldout: torch.Tensor, dest: Path) -> dict[str, int]:
    counts = {}
    for split, chosen in (("train", ~heldout), ("val", heldout)):
        rows = chosen.nonzero().flatten()
        counts[split] = _write_list(dest, split, _write_images(context.train, rows, split, dest), labels[rows].tolist())
    test = context.test
    if test is None:
        names = (dest / LISTS / "val.txt").read_text()
        write_text(dest / LISTS / "test.txt", names)
        return {**counts, "test": counts["val"]}
    true = test.labels if _test_labelled(context) and test.labels is not None else torch.zeros(len(test), dtype=torch.int64)
    counts["test"] = _write_list(dest, "test", _write_images(test, torch.arange(len(test)), "test", dest), true.tolist())
    return counts


def _write_made(folder: Path, made: OutlierSet, heldout: torch.Tensor, splits: dict[bool, str], dest: Path) -> dict[str, int]:
    """Copies of generated PNGs, one list for those of training sources and one for those of held-out ones."""
    counts, files = {}, [row["file"] for row in made.manifest]
    for kept, split in splits.items():
        rows = (heldout[made.sources] == kept).nonzero().flatten().tolist()
        names = [f"sdood/{folder.name}/{files[row]}" for row in rows]
        for row, name in zip(rows, names, strict=True):
            (dest / IMAGES.parent / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / files[row], dest / IMAGES.parent / name)
        counts[split] = _write_list(dest, split, names, made.labels[rows].tolist())
    return {split: count for split, count in counts.items() if count}


def _write_ood(context: Context, dest: Path) -> dict[str, list[str]]:
    """The run's OOD test sets; names of each group."""
    groups: dict[str, list[str]] = {"near": [], "far": []}
    for ood in context.config.data.ood:
        images = context.ood[ood.name]
        names = _write_images(images, torch.arange(len(images)), f"ood/{ood.name}", dest)
        _write_list(dest, f"ood_{ood.name}", names, [-1] * len(images))
        groups[ood.group].append(ood.name)
    return groups


def _write_configs(context: Context, classes: int, lists: dict[str, int], groups: dict[str, list[str]], dest: Path) -> None:
    detector, size = context.detector, int(context.train.images.shape[-1])
    root = dest.resolve()
    wanted = {
        "train": detector.batch_size,
        "oe": round(detector.outlier_ratio * detector.batch_size),
        "controls": round(detector.control_ratio * detector.batch_size),
    }
    known = ("train", "oe", "val", "test", "controls", "oe_heldout", "controls_heldout")
    splits = [name for name in known if lists.get(name) and wanted.get(name, 1)]

    def entry(split: str) -> dict[str, Any]:
        return {"data_dir": f"{root / IMAGES.parent}/", "imglist_pth": str(root / LISTS / f"{split}.txt")}

    workers = {name: f"@{{{name}}}" for name in ("num_workers", "num_gpus", "num_machines")}
    dataset: dict[str, Any] = {
        "name": "sdood",
        "num_classes": classes,
        "pre_size": size,
        "image_size": size,
        "interpolation": "bilinear",
        "normalization_type": "half",
        **workers,
        "split_names": splits,
    }
    for split in splits:
        dataset[split] = {
            "dataset_class": "ImglistDataset",
            **entry(split),
            "batch_size": min(wanted.get(split, 200), lists[split]),
            "shuffle": split in wanted,
        }
    if not _test_labelled(context):
        dataset["test"]["labelled"] = False
    _write_yaml(dest / CONFIGS / "dataset.yml", {"dataset": dataset})
    if all(groups.values()) and "oe_heldout" in splits:
        ood = {
            "name": "sdood_ood",
            "num_classes": classes,
            **workers,
            "dataset_class": "ImglistDataset",
            "batch_size": 128,
            "shuffle": False,
            "split_names": ["val", "nearood", "farood"],
            "val": entry("oe_heldout"),
        }
        ood |= {
            f"{group}ood": {"datasets": names, **{name: entry(f"ood_{name}") for name in names}}
            for group, names in groups.items()
        }
        _write_yaml(dest / CONFIGS / "ood.yml", {"ood_dataset": ood})
    write_yamls(dest / CONFIGS)
    file = weights_file(detector.weights)
    weights = str(file.resolve()) if file else HUB if detector.weights == HUB else ""
    settings = {"backbone": detector.backbone, "weights": weights, "pooling": detector.pooling}
    _set_values(dest / CONFIGS / "networks" / "sdood_net.yml", settings | {"input_size": detector.input_size or 0})
    _set_values(dest / CONFIGS / "postprocessors" / "sdood.yml", {"outliers": str(context.folder.resolve())})


def _set_values(path: Path, values: dict[str, Any]) -> None:
    """Other values in one of the YAMLs, whose comments stay."""
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        name = line.partition(":")[0]
        if name.strip() in values:
            setting = yaml.safe_dump({name.strip(): values[name.strip()]}, width=1 << 16)
            lines[number] = name.replace(name.strip(), setting.rstrip())
    write_text(path, "\n".join([*lines, ""]))


def _write_yaml(path: Path, value: dict[str, Any]) -> None:
    write_text(path, yaml.safe_dump(value, sort_keys=False))
