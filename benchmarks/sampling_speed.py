"""How fast outliers are made, beside two things a user would write with diffusers and the same weights.

python -m benchmarks.sampling_speed RUN --images 512 --ours dpm 6 0 1 5.9,6,12 --ours dpm 5 0.05 1 6.5 --seeds 0 1 2
RUN is a folder of `sdood inspect`: it has the diffusion model, the pseudo-labels and the reference classifier.

naive: DDPMScheduler, every step from S, two forwards for condition and null, float32.
informed: DPM-Solver++ with 20 steps, condition and null in one batch, the device's default precision.
Between them lie the batched forward alone and, on a GPU, informed in float32; with --compile each of ours has a row with and
one without, and an interval of guidance stands beside the whole range where --ours names both. So the table says which
saving gives what: batched forward, steps, precision, fewer steps, interval, compilation.

All methods denoise the same batches from the same x_S, one method after the other within a batch, so a ratio compares
neighbours in time; the figures of what they made are over all batches. A method is `equal` to a baseline where its flip rate
is within 2 points and its Frechet distance within 5 %. The fastest of ours that is equal on one half of the sources, in the mean
of all seeds, is `chosen`, once a baseline; every row is of the other half, and its columns `choosing_...` are of the half that
chose. A seed draws the halves, the noise and the wrong classes. `savings` sums up what each saving alone gives.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from benchmarks.record import RESULTS, earlier, write_result
from benchmarks.samplers import Batch, Setting, Way, informed, naive, ours
from benchmarks.savings import choose, chosen, is_equal, savings
from sdood_plugin.cli import read_config
from sdood_plugin.config import as_dict
from sdood_plugin.context import Context
from sdood_plugin.data.images import spread
from sdood_plugin.detector.network import load_network
from sdood_plugin.diffusion.unet import load_unet
from sdood_plugin.features import evaluating, extract
from sdood_plugin.randomness import derive_seed
from sdood_plugin.training import place, unet_format

BASELINES = ("naive", "informed")
HALVES = ("choosing", "reported")


@dataclass
class Method:
    """A way to make outliers, and what it made so far of each half of the sources."""

    name: str
    make: Way
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    made: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and changed settings of each of ours."""
    for sampler, steps, low, high, weights in options.ours:
        interval = [float(low), float(high)]
        words = f", guided from {interval[0]:g} to {interval[1]:g} T" if interval != [0, 1] else ""
        for weight in map(float, weights.split(",")):
            changes = {"sampler": sampler, "sampling_steps": int(steps), "guidance_interval": interval, "guidance_weight": weight}
            yield f"ours: {sampler}, {steps} steps, w = {weight:g}{words}", changes


def methods(compiled: UNet2DModel | None, options: argparse.Namespace, device: torch.device) -> list[Method]:
    """The baselines with one saving after the other, then every setting of ours."""
    found = [Method("naive", naive), Method("naive, batched forward", partial(naive, batched=True))]
    if device.type == "cuda":
        found.append(Method("informed, float32", partial(informed, half=False)))
    found.append(Method("informed", informed))
    for name, changes in wanted(options):
        found.append(Method(name, partial(ours, **changes)))
        if compiled is not None:
            found.append(Method(f"{name}, compiled", lambda s, b, changes=changes: ours(replace(s, unet=compiled), b, **changes)))
    return [method for method in found if not options.only or method.name in options.only]


def measure(method: Method, setting: Setting, batch: Batch, half: str) -> None:
    """Make a batch and note the seconds."""
    _synchronise(setting.device)
    begin = time.perf_counter()
    made = method.make(setting, batch)
    _synchronise(setting.device)
    method.seconds[half].append(time.perf_counter() - begin)
    method.made[half].append(made.cpu())


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Judge:
    """The run's reference classifier, trained on real images only: flips, stays and the Frechet distance to the real images."""

    def __init__(self, context: Context, device: torch.device) -> None:
        self.network = load_network(context.folder / "reference" / "reference.safetensors").to(device)
        self.device = device
        self.name = f"reference network ({self.network.backbone.name})"
        self.real = fid_features_to_statistics(self._features(context.train.images).cpu().double())

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return extract(self.network.backbone, images, device=self.device)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Figures of uint8 (N, 3, H, W) images made of sources with pseudo-labels int64 (N,)."""
        features = self._features(images)
        with evaluating(self.network):
            confidence, said = self.network.g_in(features).softmax(dim=1).cpu().max(dim=1)
        distance = fid_statistics_to_metric(fid_features_to_statistics(features.cpu().double()), self.real, verbose=False)
        return {
            "flip_rate": 100 * float(((said != labels) & (confidence > 0.9)).float().mean()),
            "stay_rate": 100 * float((said == labels).float().mean()),
            "fd": float(distance[KEY_METRIC_FID]),
        }


def halves(total: int, count: int, seed: int) -> dict[str, torch.Tensor]:
    """`count` sources spread over `total` images, drawn into two halves: int64 positions by name of the half."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(seed, "halves")))
    return dict(zip(HALVES, spread(total, count)[order].chunk(2), strict=True))


def summarise(found: list[Method], judge: Judge, labels: dict[str, torch.Tensor], batch_size: int) -> list[dict[str, Any]]:
    """One row for each method and baseline: what it made, how fast, and how it stands to the baseline, on the reported half."""
    both = itertools.product(HALVES, found)
    figures = {(half, method.name): _figures(method, half, judge, labels[half], batch_size) for half, method in both}
    baselines = [method for method in found if method.name in BASELINES]
    return [_beside(baseline, method, figures) for baseline in baselines for method in found]


def _figures(method: Method, half: str, judge: Judge, labels: torch.Tensor, batch_size: int) -> dict[str, float]:
    made = torch.cat(method.made[half])
    speed = batch_size / statistics.median(method.seconds[half])
    return {"images": len(made), "images_per_s": speed, **judge(made, labels[: len(made)])}


def _beside(baseline: Method, method: Method, figures: dict[tuple[str, str], dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"baseline": baseline.name, "method": method.name}
    for half in reversed(HALVES):
        own, theirs = figures[half, method.name], figures[half, baseline.name]
        pairs = zip(baseline.seconds[half], method.seconds[half], strict=True)
        flips, distance = own["flip_rate"] - theirs["flip_rate"], own["fd"] / theirs["fd"] - 1
        said = {"ratio": statistics.median(other / mine for other, mine in pairs)}
        said |= own if half == "reported" else {}
        said |= {"flips_above": flips, "fd_above_percent": 100 * distance}
        said["equal"] = is_equal(flips, distance)
        row |= {f"choosing_{name}" if half == "choosing" else name: value for name, value in said.items()}
    return row


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--images", type=int, default=512, help="sources, spread over the training images; half of them choose")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--mode", default=None, help="the run's own if not given; so are w and S")
    parser.add_argument("--weight", type=float, default=None)
    parser.add_argument("--start", type=float, default=None, help="S / T")
    parser.add_argument(
        "--ours",
        nargs=5,
        action="append",
        metavar=("SAMPLER", "STEPS", "LOW", "HIGH", "W[,W...]"),
        required=True,
        help="interval of guidance as fractions of T; few steps may need another w for as many flips; repeatable",
    )
    parser.add_argument("--compile", action="store_true", help="also torch.compile (a minute or more for each batch shape)")
    parser.add_argument("--only", nargs="+", help="names of methods, to try things out")
    parser.add_argument("--note", help="a sentence to stand in the result")
    parser.add_argument("--suffix", default="")
    options = parser.parse_args()
    if options.images < 2 * options.batch_size:
        parser.error(f"--images {options.images}: give {2 * options.batch_size} or more, a batch for each half")
    return options


def main() -> None:
    """Measure batch after batch of each seed and write results/sampling_speed[-suffix].json after each of both halves."""
    options = _options()
    context = Context(read_config(options.run / "config.yaml"), options.run)
    setting, compiled = _setting(context, options)
    judge, size = Judge(context, setting.device), options.batch_size
    shared = {**as_dict(context.config), "sampled": as_dict(setting.outliers), "images": options.images, "batch_size": size}
    shared |= {"ours": [name for name, _ in wanted(options)], "compile": options.compile}
    name, chosen_by = f"sampling_speed{options.suffix}", "the mean over seeds of `choosing_...`, of the other half of the sources"
    rows, spent = earlier(RESULTS / f"{name}.json", shared)
    rows = [row for row in rows if row["seed"] not in options.seeds]
    facts = {"data": {"train": len(context.train), "sources": options.images}, "chosen_by": chosen_by}
    facts |= {"note": options.note} if options.note else {}
    facts |= {"features": judge.name, "outliers": as_dict(setting.outliers), "batch_size": size}
    for seed in options.seeds:
        own = replace(setting, seed=derive_seed(seed, "sampling-speed"))
        for made in _measured(context, own, methods(compiled, options, own.device), judge, options, seed):
            all_rows = choose(rows + [{"seed": seed, **row} for row in made])
            facts |= {"chosen_settings": chosen(all_rows), "savings": savings(all_rows)}
            seeds = sorted({row["seed"] for row in all_rows})
            write_result(name, shared, seeds, all_rows, facts, spent_s=spent, folder=RESULTS, device=context.config.device)
        rows = all_rows
    for row in (*rows, *chosen(rows), *savings(rows)):
        print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})


def _measured(
    context: Context, setting: Setting, found: list[Method], judge: Judge, options: argparse.Namespace, seed: int
) -> Iterator[list[dict[str, Any]]]:
    """The rows of a seed after each batch of both halves; the last batch of a half is left out where it is not whole."""
    chosen = halves(len(context.train), options.images, seed)
    labels = {half: context.labels.labels[rows] for half, rows in chosen.items()}
    warm = _batch(context, chosen[HALVES[0]][: options.batch_size], setting.device)
    for method in found:
        if not method.name.startswith("naive"):  # kernels, caches, compilation
            method.make(setting, warm)
    for pair in zip(*(rows.split(options.batch_size) for rows in chosen.values()), strict=False):
        if min(map(len, pair)) == options.batch_size:
            for half, rows in zip(HALVES, pair, strict=True):
                batch = _batch(context, rows, setting.device)
                for method in found:
                    measure(method, setting, batch, half)
            yield summarise(found, judge, labels, options.batch_size)


def _setting(context: Context, options: argparse.Namespace) -> tuple[Setting, UNet2DModel | None]:
    """What all methods share, its U-Net as it is and, where that is asked for, compiled."""
    device, config = context.accelerator.device, context.config
    changes = {"mode": options.mode, "guidance_weight": options.weight, "start_fraction": options.start}
    outliers = replace(config.outliers, **{name: value for name, value in changes.items() if value is not None})

    def loaded(compiled: bool) -> UNet2DModel:
        weights, diffusion = context.folder / "diffusion" / "unet.safetensors", replace(config.diffusion, compile=compiled)
        unet = load_unet(weights, diffusion, classes=context.labels.classes, image_size=context.train.images.shape[-1])
        return place(unet, device, unet_format(device))

    setting = Setting(loaded(False), config, outliers, context.labels.classes, device)
    return setting, loaded(True) if options.compile else None


def _batch(context: Context, rows: torch.Tensor, device: torch.device) -> Batch:
    return Batch(context.train.images[rows].to(device), context.labels.labels[rows].to(device), rows.to(device))


if __name__ == "__main__":
    main()
